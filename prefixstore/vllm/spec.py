"""The offloading spec: vLLM's CPU tier with our tier below, on every platform.

Differs from vLLM's ``TieringOffloadingSpec`` in two things. On a CPU platform the worker is
``HostCopyWorker``, where vLLM's refuses. And the CPU tier's region loses its name in /dev/shm as soon
as every process has mapped it, so that no way of dying leaks it (vLLM passes no barrier here, so a
SIGKILL would leave all of ``cpu_bytes_to_use`` behind).
"""

import logging

from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from prefixstore.errors import InvalidError
from prefixstore.vllm.compat import unname_region
from prefixstore.vllm.layout import SlotLayout, Span, merge_spans
from prefixstore.vllm.worker import HostCopyWorker

__all__ = ["PrefixStoreSpec"]

logger = logging.getLogger("prefixstore")

FEW_SLOTS = 32
"""Below this the CPU tier, not the store, decides what hits: 512 tokens in 16-token blocks."""


class PrefixStoreSpec(TieringOffloadingSpec):
    """Builds the manager in the scheduler process and the worker in each worker process.

    Attributes:
        slot_layout: Set in a worker process once its KV cache is registered.
    """

    slot_layout: SlotLayout | None = None

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        given = self.extra_config["cpu_bytes_to_use"]
        if self.num_chunks < 1:
            raise InvalidError(
                f"cpu_bytes_to_use={given} holds no chunk: one takes {self.kv_bytes_per_chunk} bytes. "
                "Set it to some hundred times that, and give /dev/shm as much (docker: --shm-size)"
            )
        if self.num_chunks < FEW_SLOTS:
            logger.warning(
                "cpu_bytes_to_use=%s holds only %d chunks of %d bytes: longer prefixes are loaded in "
                "part. Raise it, and the room in /dev/shm with it (docker: --shm-size)",
                given,
                self.num_chunks,
                self.kv_bytes_per_chunk,
            )

    @override
    def get_manager(self) -> OffloadingManager:
        manager = super().get_manager()
        region = self._scheduler_mmap
        # The engine builds this role after all workers have registered their caches, and so have
        # mapped the region; ours is the last mapping.
        if region is not None:
            unname_region(region)
        return manager

    @override
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        self.slot_layout = self._describe_slots(kv_caches)
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        rank = 0 if self.replicated_layout else self.config.parallel.rank
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            return HostCopyWorker(kv_caches, region=region, blocks_per_chunk=self.blocks_per_chunk)
        except BaseException:
            region.cleanup()
            raise

    def _describe_slots(self, kv_caches: CanonicalKVCaches) -> SlotLayout:
        """Work out which bytes of this worker's page each group fills."""
        offsets: list[int] = []
        end = 0
        for cache in kv_caches.tensors:
            offsets.append(end)
            end += cache.page_size_bytes * self.blocks_per_chunk
        spans: dict[int, list[Span]] = {}
        for group, refs in zip(self.config.groups, kv_caches.group_data_refs, strict=True):
            spans[group.group_id] = merge_spans(
                Span(
                    offsets[ref.tensor_idx]
                    + position * kv_caches.tensors[ref.tensor_idx].page_size_bytes,
                    ref.page_size_bytes,
                )
                for ref in refs
                for position in range(self.blocks_per_chunk)
            )
        return SlotLayout(page_bytes=self.cpu_page_size_per_worker, spans=spans)
