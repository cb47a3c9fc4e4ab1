"""Prometheus metrics that vLLM's own do not tell.

vLLM already counts, for each tier, chunk queries and hits, bytes, times, failed jobs and active jobs
(``vllm:kv_offload_tiering_*``). Here is the rest. Names are declared to vLLM before any engine starts,
in the API server's process: a name that is observed but not declared would fail every request there.
"""

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

__all__ = ["TierMetrics", "metric_definitions"]

LOAD_MISSES = "vllm:prefixstore_load_misses"
STORES_SKIPPED = "vllm:prefixstore_stores_skipped"
DECLINED_HITS = "vllm:prefixstore_declined_hits"
FAILED_CALLBACKS = "vllm:prefixstore_failed_callbacks"
STORES_REOFFERED = "vllm:prefixstore_stores_reoffered"
EVENTS_LOST = "vllm:prefixstore_events_lost"
COMPRESSION_SAVED_BYTES = "vllm:prefixstore_compression_saved_bytes"
STATE = "vllm:prefixstore_state"
LOAD_BYTES = "vllm:kv_offload_load_bytes"
STORE_BYTES = "vllm:kv_offload_store_bytes"
"""vLLM's own, which it declares itself; its connector counts them in tier mode, we in direct mode."""

STATES = ("on", "read_only", "opening", "off")


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Return what the tier may observe, by name."""
    return {
        LOAD_MISSES: OffloadingCounterMetadata(
            documentation=(
                "Chunks that a lookup had found but a load did not bring, by reason: absent, or the "
                "check that failed. Each was recomputed."
            ),
            labelnames=("reason",),
        ),
        STORES_SKIPPED: OffloadingCounterMetadata(
            documentation="Chunks that were offered and not stored, by reason.",
            labelnames=("reason",),
        ),
        DECLINED_HITS: OffloadingCounterMetadata(
            documentation="Stored chunks that were not loaded on purpose, by reason.",
            labelnames=("reason",),
        ),
        FAILED_CALLBACKS: OffloadingCounterMetadata(
            documentation="Callbacks of prefixstore that failed and were answered with a miss.",
            labelnames=("callback",),
        ),
        STORES_REOFFERED: OffloadingCounterMetadata(
            documentation=(
                "Chunks that were skipped before and taken from the CPU tier once the store was able."
            ),
        ),
        EVENTS_LOST: OffloadingCounterMetadata(
            documentation="KV events of chunks that were not announced: too many waited for a step.",
        ),
        COMPRESSION_SAVED_BYTES: OffloadingCounterMetadata(
            documentation="Bytes that compression kept off the root, summed over stored chunks.",
        ),
        STATE: OffloadingGaugeMetadata(
            documentation="1 for the state that the store is in: on, read_only, opening or off.",
            labelnames=("state",),
        ),
    }


class TierMetrics:
    """Observations of one tier since the last ``take``. Not thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._state: str | None = None
        self._reported_state: str | None = None

    def count(self, name: str, label: str | None = None, *, by: int = 1) -> None:
        """Add to a counter; ``label`` is the value of its one label."""
        if by:
            self._counts[name, () if label is None else (label,)] += by

    def set_state(self, state: str) -> None:
        """Note the state that the store is in."""
        self._state = state

    def take(self) -> OffloadingConnectorStats | None:
        """Return and forget what was observed; None when nothing was."""
        if not self._counts and self._state == self._reported_state:
            return None
        stats = OffloadingConnectorStats()
        for (name, labels), value in self._counts.items():
            stats.increase_counter(name, value, labels)
        self._counts.clear()
        if self._state != self._reported_state:
            for state in STATES:
                stats.set_gauge(STATE, int(state == self._state), (state,))
            self._reported_state = self._state
        return stats
