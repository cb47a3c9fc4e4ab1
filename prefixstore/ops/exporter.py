"""What a root holds and was worth, as Prometheus reads it.

One thread looks at the root every so often; a scrape is answered from what it saw last and never waits for
a mount. What engines do is told by vLLM's own page, engine by engine and at once; this page knows what no
engine does, the root as a whole, and adds up what the writers wrote down (``prefixstore.store.history``),
some minutes late.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.ops.report import RootReport, report
from prefixstore.store import PrefixStore
from prefixstore.store.history import Hour, read_history

__all__ = ["RootExporter"]

COUNTED = {
    "lookup_keys": ("looked_up_chunks", "Chunks that lookups asked for."),
    "lookup_found": ("found_chunks", "Chunks that lookups found."),
    "loaded": ("loaded_chunks", "Chunks that were read, verified and handed to an engine."),
    "loaded_bytes": ("loaded_bytes", "Bytes of KV that loads brought, decoded."),
    "read_bytes": ("read_bytes", "Bytes that loads read from the root."),
    "stored": ("stored_chunks", "Chunks that were published."),
    "stored_bytes": ("stored_bytes", "Bytes of payload that were published, as they lie on disk."),
    "evicted": ("evicted_chunks", "Chunks that eviction removed."),
    "evicted_bytes": ("evicted_bytes", "Bytes of files that eviction removed."),
}
"""Counters of the history by name: what they are called here, and what they say."""
BY_REASON = {
    "missed_": ("load_misses", "Loads that brought nothing, by reason."),
    "skipped_": ("stores_skipped", "Chunks that were offered and not stored, by reason."),
}
NAMESPACE = ("namespace",)


@dataclass(slots=True)
class _Seen:
    """What the last look at the root found; replaced as a whole."""

    report: RootReport | None = None
    is_up: bool = False
    seconds: float = 0.0
    ended_s: float = 0.0
    sums: Counter[tuple[NamespaceId, str]] = field(default_factory=Counter)


class RootExporter:
    """A collector for ``prometheus_client``; safe for concurrent use.

    ``look`` is called by one thread at a time, the caller's or ``run``'s.
    """

    def __init__(self, store: PrefixStore, *, clock: Clock | None = None) -> None:
        """Take a store that is opened without a namespace; the caller closes it, after ``run``."""
        self._store = store
        self._clock = clock or SystemClock()
        self._seen = _Seen()
        self._counted: dict[tuple[NamespaceId, int, str], int] | None = None
        self._sums: Counter[tuple[NamespaceId, str]] = Counter()

    def run(self, *, interval_s: float, stop: threading.Event) -> None:
        """Look at the root again and again until told to stop."""
        while not stop.is_set():
            self.look()
            stop.wait(interval_s)

    def look(self) -> None:
        """Scan the root once; what fails shows as a root that is not up."""
        started_s = self._clock.monotonic_s()
        seen = _Seen(report=self._seen.report)
        with contextlib.suppress(PrefixStoreError, OSError):
            seen.report = report(self._store)
            hours, _ = read_history(self._store.root)
            self._add(hours)
            seen.is_up = not seen.report.errors
        seen.seconds = self._clock.monotonic_s() - started_s
        seen.ended_s = self._clock.wall_s()
        seen.sums = Counter(self._sums)
        self._seen = seen

    def describe(self) -> list[Metric]:
        """Keep the registry from asking for figures when it is told of this collector."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric from what was seen last."""
        seen = self._seen
        yield _gauge("up", "1 if the last look at the root saw all of it, else 0.", int(seen.is_up))
        yield _gauge("scan_seconds", "How long the last look took.", seen.seconds)
        # On a hung mount the thread never comes back: only this one tells.
        yield _gauge(
            "scan_timestamp_seconds", "When the last look ended, since the epoch.", seen.ended_s
        )
        if seen.report is not None:
            yield from _root_metrics(seen.report)
            yield from _namespace_metrics(seen.report)
        yield from _history_metrics(seen.sums)

    def _add(self, hours: list[Hour]) -> None:
        """Add what the writers have written down since the last look.

        The first look only remembers: a counter that began with weeks of the past would be read as a
        burst. Files that are removed for their age take nothing away again.
        """
        counted: dict[tuple[NamespaceId, int, str], int] = {}
        for hour in hours:
            for name, amount in hour.counts.items():
                place = (hour.namespace, hour.starts_s, name)
                counted[place] = counted.get(place, 0) + amount
        before = self._counted
        self._counted = counted
        for (namespace, starts_s, name), amount in counted.items():
            had = amount if before is None else before.get((namespace, starts_s, name), 0)
            self._sums[namespace, name] += max(0, amount - had)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"prefixstore_root_{name}", about, value=value)


def _root_metrics(found: RootReport) -> Iterator[Metric]:
    yield _gauge("free_bytes", "Room on the root's filesystem.", found.free_bytes)
    yield _gauge("total_bytes", "Size of the root's filesystem.", found.total_bytes)
    yield _gauge("pins", "Named pins.", len(found.pins))
    yield _gauge("writers", "Writers that announced themselves and did not leave.", found.writers)
    yield _gauge("quarantine_files", "Damaged blobs kept for inspection.", found.quarantine_files)
    yield _gauge("quarantine_bytes", "What they take.", found.quarantine_bytes)
    yield _gauge("torn_files", "Files under a blob's name that are none.", found.torn_files)


def _namespace_metrics(found: RootReport) -> Iterator[Metric]:
    gauges = {
        name: GaugeMetricFamily(f"prefixstore_namespace_{name}", about, labels=NAMESPACE)
        for name, about in (
            ("chunks", "Chunks."),
            ("file_bytes", "What their files take."),
            ("raw_bytes", "Their payloads, decoded."),
            ("last_use_timestamp_seconds", "When one of them was last used, since the epoch."),
        )
    }
    for line in found.namespaces:
        values = (line.chunks, line.file_bytes, line.raw_bytes, line.used_s)
        for gauge, value in zip(gauges.values(), values, strict=True):
            gauge.add_metric([line.namespace], value)
    yield from gauges.values()


def _history_metrics(sums: Counter[tuple[NamespaceId, str]]) -> Iterator[Metric]:
    for counter, (name, about) in COUNTED.items():
        family = CounterMetricFamily(f"prefixstore_{name}", about, labels=NAMESPACE)
        for (namespace, counted), amount in sorted(sums.items()):
            if counted == counter:
                family.add_metric([namespace], amount)
        yield family
    for prefix, (name, about) in BY_REASON.items():
        family = CounterMetricFamily(f"prefixstore_{name}", about, labels=("namespace", "reason"))
        for (namespace, counted), amount in sorted(sums.items()):
            if counted.startswith(prefix):
                family.add_metric([namespace, counted.removeprefix(prefix)], amount)
        yield family
