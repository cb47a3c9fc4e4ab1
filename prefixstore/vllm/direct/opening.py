"""How a worker of the direct path comes to be: pages, device, ring, and then its part of the store."""

from typing import TYPE_CHECKING

import msgspec
import torch
from vllm.platforms import current_platform

from prefixstore.errors import InvalidError
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import StoreTarget
from prefixstore.vllm.backends import describe_worker, join_accounts
from prefixstore.vllm.direct.device import CudaDevice, Device, HostDevice
from prefixstore.vllm.direct.pages import Pages, find_regions
from prefixstore.vllm.direct.ring import StagingRing
from prefixstore.vllm.direct.shapes import divide_memory, layout_field
from prefixstore.vllm.direct.worker import DirectWorker, Patience
from prefixstore.vllm.fingerprint import scheduler_fields
from prefixstore.vllm.layout import SlotLayout, Span
from prefixstore.vllm.machine import digest_memory, index_dir
from prefixstore.vllm.weights import WeightDigests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from prefixstore.clock import Clock
    from prefixstore.vllm.direct.observer import Observer
    from prefixstore.vllm.options import TierOptions

__all__ = ["choose_device", "open_worker"]


def open_worker(
    config: "VllmConfig",
    caches: "KVCacheConfig",
    kv_caches: "dict[str, torch.Tensor]",
    *,
    options: "TierOptions",
    blocks_per_chunk: int,
    observer: "Observer",
    clock: "Clock",
) -> "tuple[DirectWorker, Callable[[], None]]":
    """Make a worker whose store is not open yet; the second value opens it, on any thread.

    Each worker finds out the namespace of its own part: everything that decides its bytes is known
    here, and a rank that sees other weights than the others then finds nothing of theirs.

    Raises:
        InvalidError: The KV cache's form, or the memory allowed, does not do.
    """
    rank, ranks = config.parallel_config.rank, config.parallel_config.tensor_parallel_size
    groups = [group.layer_names for group in caches.kv_cache_groups]
    pages = [
        Pages(
            find_regions(kv_caches, layers, blocks=caches.num_blocks),
            blocks_per_chunk=blocks_per_chunk,
        )
        for layers in groups
    ]
    largest = max(group.payload_bytes for group in pages)
    memory = divide_memory(options, largest)
    device = choose_device(kv_caches[groups[0][0]])
    ring = StagingRing(device.allocate(memory.ring_bytes), payload_bytes=largest)
    account = describe_worker(
        config,
        {name: kv_caches[name] for layers in groups for name in layers},
        rank=rank,
        layout=_payload_layout(pages),
    )
    worker = DirectWorker(
        pages=pages,
        device=device,
        ring=ring,
        observer=observer,
        patience=Patience(load=options.load_deadline_s),
        clock=clock,
        element_bytes=account.element_bytes,
        is_alone=ranks == 1,
    )

    def bind() -> None:
        digests = WeightDigests(digest_memory("weights"), full=options.weights == "full")
        fields = {
            **scheduler_fields(config, caches, digests=digests),
            **join_accounts([account]),
            "layout": layout_field(pages, rank=rank, ranks=ranks),
        }
        store = options.store_config(index_dir=index_dir())
        worker.bind(
            IoClient(
                StoreTarget(
                    root=options.root,
                    namespace=msgspec.json.encode(fields),
                    options=msgspec.json.encode(store),
                ),
                memory.limits,
                clock=clock,
            )
        )

    return worker, bind


def _payload_layout(pages: "Sequence[Pages]") -> SlotLayout:
    """Say as the tier does that each group's payload is all its own."""
    return SlotLayout(
        page_bytes=max(group.payload_bytes for group in pages),
        spans={number: [Span(0, group.payload_bytes)] for number, group in enumerate(pages)},
    )


def choose_device(cache: "torch.Tensor") -> Device:
    """Return the device that a KV cache lies on.

    Raises:
        InvalidError: It is neither host memory nor a CUDA device's.
    """
    if cache.device.type == "cpu":
        return HostDevice()
    if cache.device.type == "cuda" and current_platform.is_cuda():
        from vllm._custom_ops import swap_blocks_batch

        return CudaDevice(torch, index=cache.device.index or 0, copy_batch=swap_blocks_batch)
    raise InvalidError(f"mode=direct knows CPUs and CUDA, not {cache.device}: use mode=tier")
