"""Copies KV between a CPU platform's cache and the slots of the CPU tier.

vLLM's own ``CPUOffloadingWorker`` speaks CUDA and XPU; on a CPU platform the "device" is host memory,
so a transfer is a plain copy, done when ``submit_*`` returns. The slot layout is the same as vLLM's
direct layout (vllm/v1/kv_offload/cpu/shared_offload_region.py): each worker has one page a slot, in it
the tensors in order, in each tensor the chunk's blocks in order.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from prefixstore.vllm.compat import release_region

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

__all__ = ["HostCopyWorker", "Placement", "place_blocks"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one block of a transfer lies on both sides.

    Attributes:
        group: Position of its KV group among the offloaded groups.
        block: The block's id in the KV cache.
        slot: The slot in the CPU tier.
        position: The block's position in the slot's chunk, from 0.
    """

    group: int
    block: int
    slot: int
    position: int


def place_blocks(
    blocks: GPULoadStoreSpec, slots: BlockIDsLoadStoreSpec, *, blocks_per_chunk: int
) -> list[Placement]:
    """Pair the blocks of a transfer with places in slots.

    The first chunk of a group may be entered in the middle: ``block_indices`` holds each group's
    first block as counted from the start of the prompt (vllm/v1/kv_offload/base.py,
    ``GPULoadStoreSpec``).
    """
    block_ids = blocks.block_ids.tolist()
    slot_ids = slots.block_ids.tolist()
    placements: list[Placement] = []
    first_slot = 0
    taken = 0
    for group, (size, index) in enumerate(
        zip(blocks.group_sizes, blocks.block_indices, strict=True)
    ):
        if size == 0:
            continue
        skipped = index % blocks_per_chunk
        for i in range(size):
            chunk, position = divmod(skipped + i, blocks_per_chunk)
            placements.append(
                Placement(group, block_ids[taken + i], slot_ids[first_slot + chunk], position)
            )
        taken += size
        first_slot += -(-(skipped + size) // blocks_per_chunk)
    assert taken == len(block_ids), f"{len(block_ids)} blocks submitted, {taken} placed"
    assert first_slot == len(slot_ids), f"{len(slot_ids)} slots submitted, {first_slot} used"
    return placements


class HostCopyWorker(OffloadingWorker):
    """An ``OffloadingWorker`` for CPU platforms. Owned and called by the model runner's thread."""

    def __init__(
        self, kv_caches: CanonicalKVCaches, *, region: "SharedOffloadRegion", blocks_per_chunk: int
    ) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._finished: list[TransferResult] = []
        # Both sides as (rows, blocks of a row, page bytes), so that one index names one block's page;
        # as arrays, since torch would share each small copy out to threads that compute.
        self._device_pages: list[np.ndarray[Any, np.dtype[np.int8]]] = []
        self._slot_pages: list[np.ndarray[Any, np.dtype[np.int8]]] = []
        for cache in kv_caches.tensors:
            page_bytes = cache.page_size_bytes
            pages = cache.tensor.view(torch.int8).view((-1, page_bytes))
            self._device_pages.append(pages.numpy())
            row = region.create_next_worker_view(page_bytes * blocks_per_chunk)
            self._slot_pages.append(row.unflatten(1, (blocks_per_chunk, page_bytes)).numpy())

    @override
    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        self._copy(job_id, src_spec, dst_spec, to_slots=True)
        return True

    @override
    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        self._copy(job_id, dst_spec, src_spec, to_slots=False)
        return True

    def _copy(
        self,
        job_id: int,
        blocks: GPULoadStoreSpec,
        slots: BlockIDsLoadStoreSpec,
        *,
        to_slots: bool,
    ) -> None:
        started_s = time.perf_counter()
        copied_bytes = 0
        for place in place_blocks(blocks, slots, blocks_per_chunk=self._blocks_per_chunk):
            for ref in self._groups[place.group]:
                used = ref.page_size_bytes
                page = self._device_pages[ref.tensor_idx][place.block, :used]
                kept = self._slot_pages[ref.tensor_idx][place.slot, place.position, :used]
                if to_slots:
                    kept[:] = page
                else:
                    page[:] = kept
                copied_bytes += used
        self._finished.append(
            TransferResult(
                job_id=job_id,
                success=True,
                transfer_size=copied_bytes,
                transfer_time=time.perf_counter() - started_s,
            )
        )

    @override
    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    @override
    def wait(self, job_ids: set[int]) -> None:
        """Return at once: a transfer is complete when its submission returns."""

    @override
    def shutdown(self) -> None:
        self._device_pages.clear()
        self._slot_pages.clear()
        release_region(self._region)
