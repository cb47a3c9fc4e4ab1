"""What only a worker knows of the bytes it makes: backend, kernels' layout, runner, slot layout.

The scheduler's process cannot tell which attention backend was chosen, nor which instruction set a CPU
kernel packs its cache for; each worker says so in the connector's handshake after its KV cache is
registered.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.platforms import current_platform

from prefixstore.errors import InvalidError
from prefixstore.vllm.layout import SlotLayout
from prefixstore.vllm.machine import name_shared_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from vllm.config import VllmConfig

__all__ = ["WorkerAccount", "describe_worker", "join_accounts"]


@dataclass(frozen=True)
class WorkerAccount(KVConnectorHandshakeMetadata):
    """One worker's account of its KV cache; crosses processes by pickle, within one engine.

    Attributes:
        rank: The worker's rank in its world.
        layout: Its slot layout.
        element_bytes: The size of one KV element.
        backends: What computes and packs KV: one line for each distinct kind of layer.
        runner: The model runner's version.
        device: The platform, the kind of device, and which of the FP8 formats is meant there: ROCm calls its
            devices CUDA's, and some of them bias FP8 otherwise under the same name of a cache's dtype. Of
            a quantised model or cache its compute capability too: it decides to what precision kernels
            compute, and whether attention quantises its queries.
        shared_memory: Tells the /dev/shm that it maps from every other, and no part of the namespace.
    """

    rank: int
    layout: SlotLayout
    element_bytes: int
    backends: tuple[str, ...]
    runner: str
    device: str
    shared_memory: str = ""


def describe_worker(
    config: "VllmConfig", kv_caches: "Mapping[str, torch.Tensor]", *, rank: int, layout: SlotLayout
) -> WorkerAccount:
    """Describe the KV cache that was just registered with this worker."""
    layers = config.compilation_config.static_forward_context
    backends = {_describe_layer(layers.get(name), kv_caches[name]) for name in kv_caches}
    first = next(iter(kv_caches.values()))
    tensor = first[0] if isinstance(first, list | tuple) else first
    return WorkerAccount(
        rank=rank,
        layout=layout,
        element_bytes=tensor.element_size(),
        backends=tuple(sorted(backends)),
        runner="v2" if config.use_v2_model_runner else "v1",
        device=":".join(_describe_device(config, tensor)),
        shared_memory=name_shared_memory(),
    )


def _describe_device(config: "VllmConfig", tensor: "torch.Tensor") -> "Iterator[str]":
    yield current_platform.device_name
    yield tensor.device.type
    yield str(current_platform.fp8_dtype())
    is_quantized = config.cache_config.cache_dtype not in {"auto", "bfloat16", "float16"}
    if is_quantized or config.quant_config is not None:
        capability = current_platform.get_device_capability()
        yield capability.as_version_str() if capability is not None else "-"


def _describe_layer(layer: Any, cache: Any) -> str:
    """Name what computes one layer's KV and the form it has in memory, less the number of blocks."""
    tensors = cache if isinstance(cache, list | tuple) else [cache]
    forms = [f"{tensor.dtype}{list(tensor.shape[1:])}/{_strides(tensor)}" for tensor in tensors]
    backend = getattr(layer, "attn_backend", None)
    parts = [
        type(layer).__qualname__,
        backend.get_name() if backend is not None else "-",
        type(getattr(layer, "impl", None)).__qualname__,
        # The CPU kernels pack keys for the instruction set at hand: AMX tiles differ from vectors.
        f"isa={getattr(layer, 'isa', '-')}",
        *forms,
    ]
    return " ".join(parts)


def _strides(tensor: Any) -> list[object]:
    """Return the strides inside a block; one that goes over all blocks (a layout with heads first) by name."""
    blocks = tensor.shape[0] * tensor.stride(0)
    return ["blocks" if stride == blocks else stride for stride in tensor.stride()[1:]]


def join_accounts(accounts: "Sequence[WorkerAccount]") -> "Mapping[str, object]":
    """Return the namespace fields that the workers agree on.

    Raises:
        InvalidError: Workers of one engine store different kinds of bytes.
    """
    kinds = {(account.backends, account.runner, account.device) for account in accounts}
    if len(kinds) != 1:
        raise InvalidError(f"the workers' KV differs in kind, so chunks have no one form: {kinds}")
    first = accounts[0]
    return {
        "backends": list(first.backends),
        "runner": first.runner,
        "device": first.device,
        "element_bytes": first.element_bytes,
        "payload": {
            str(group): [[span.offset, span.length] for span in spans]
            for group, spans in first.layout.spans.items()
        },
        "page_bytes": [account.layout.page_bytes for account in accounts],
    }
