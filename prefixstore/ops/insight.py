"""What an operator asks of a root, gathered once as plain values: ``prefixstore.ops.page`` draws them.

What fills it, what it was worth by the hour, how old and how deep is what it keeps, and what the next eviction
would take. Figures are of one scan and of the history that the writers wrote down.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefixstore.clock import Clock, SystemClock
from prefixstore.keys import NamespaceId
from prefixstore.ops.report import RootReport, report
from prefixstore.store import EvictionReport, PrefixStore
from prefixstore.store.history import HOUR_S, read_history

__all__ = ["AGES_S", "DEPTHS", "HourSum", "Insight", "gather"]

AGES_S = (3600, 6 * 3600, 86400, 3 * 86400, 7 * 86400, 30 * 86400)
"""Upper ends of the classes of age, since the last use; the last class has none."""
DEPTHS = (256, 1024, 4096, 16384, 65536)
"""Upper ends of the classes of depth in tokens; the last class has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HourSum:
    """What all writers counted in one hour.

    Attributes:
        starts_s: When it began, in seconds since the epoch.
        looked_up: Chunks that lookups asked for.
        found: Chunks that they found.
        loaded: Chunks that were loaded.
        loaded_bytes: Their KV, decoded.
        stored_bytes: Payload that was published.
        evicted_bytes: Files that eviction removed.
        missed: Loads that brought nothing.
        tokens: Tokens whose KV was loaded, and so not computed.
    """

    starts_s: int
    looked_up: int = 0
    found: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    evicted_bytes: int = 0
    missed: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Insight:
    """The answers.

    Attributes:
        now_s: When they were gathered, in seconds since the epoch.
        root: What is there.
        hours: What happened, in order; hours without anything are left out.
        ages: Bytes of files by the class of their age; one more than ``AGES_S``.
        depths: Bytes of files by the class of their depth; one more than ``DEPTHS``.
        pinned_bytes: Bytes of files that pins hold.
        eviction: What would go; None when there is nothing to evict for.
        eviction_to_bytes: Down to which usage that is.
        errors: Sentences on what could not be read.
    """

    now_s: int
    root: RootReport
    hours: tuple[HourSum, ...]
    ages: tuple[int, ...]
    depths: tuple[int, ...]
    pinned_bytes: int
    eviction: EvictionReport | None
    eviction_to_bytes: int
    errors: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens whose KV was loaded, and so not computed, over all hours."""
        return sum(hour.tokens for hour in self.hours)


def gather(
    store: PrefixStore,
    *,
    since_s: int,
    evict_to_bytes: int | None,
    clock: Clock | None = None,
) -> Insight:
    """Scan a root and work out the answers.

    Args:
        store: The root, opened without a namespace; read-only is enough.
        since_s: Where the history begins, in seconds since the epoch.
        evict_to_bytes: Down to which usage the next eviction is planned; a tenth less than now if None.
        clock: The clock that ages are counted by.

    Raises:
        PrefixStoreError: The root's own files cannot be read.
    """
    found = report(store)
    now_s = int((clock or SystemClock()).wall_s())
    ages, depths = [0] * (len(AGES_S) + 1), [0] * (len(DEPTHS) + 1)
    pinned_bytes = 0
    chunk_tokens: dict[NamespaceId, int] = {}
    for line in found.namespaces:
        for row in store.hints.scan(line.namespace):
            record = row.record
            ages[_class(AGES_S, now_s - record.used_s)] += record.file_bytes
            depths[_class(DEPTHS, record.end_token)] += record.file_bytes
            pinned_bytes += record.file_bytes if row.refs.pins else 0
            if record.parent is None and record.end_token:
                known = chunk_tokens.get(line.namespace, record.end_token)
                chunk_tokens[line.namespace] = min(known, record.end_token)
    hours, errors = _sum_hours(store, since_s=since_s, chunk_tokens=chunk_tokens)
    target_bytes = int(found.file_bytes * 0.9) if evict_to_bytes is None else evict_to_bytes
    eviction = None
    if found.file_bytes > target_bytes:
        eviction = store.evict(target_bytes, dry_run=True, scan=False)
    return Insight(
        now_s=now_s,
        root=found,
        hours=tuple(hours),
        ages=tuple(ages),
        depths=tuple(depths),
        pinned_bytes=pinned_bytes,
        eviction=eviction,
        eviction_to_bytes=target_bytes,
        errors=(*found.errors, *errors),
    )


def _class(ends: Sequence[int], value: int) -> int:
    """Return the index of the first end that a value stays below."""
    return next((at for at, end in enumerate(ends) if value < end), len(ends))


def _sum_hours(
    store: PrefixStore, *, since_s: int, chunk_tokens: dict[NamespaceId, int]
) -> tuple[list[HourSum], list[str]]:
    """Add up all writers' hours.

    Tokens are counted for namespaces that still hold a first chunk, which tells how long theirs are.
    """
    read, errors = read_history(store.root, since_s=since_s - since_s % HOUR_S)
    sums: dict[int, Counter[str]] = {}
    for hour in read:
        counts = sums.setdefault(hour.starts_s, Counter())
        counts.update(hour.counts)
        tokens = hour.counts.get("loaded", 0) * chunk_tokens.get(hour.namespace, 0)
        counts.update({"tokens": tokens})
    hours = [
        HourSum(
            starts_s=starts_s,
            looked_up=counts["lookup_keys"],
            found=counts["lookup_found"],
            loaded=counts["loaded"],
            loaded_bytes=counts["loaded_bytes"],
            stored_bytes=counts["stored_bytes"],
            evicted_bytes=counts["evicted_bytes"],
            missed=sum(n for name, n in counts.items() if name.startswith("missed_")),
            tokens=counts["tokens"],
        )
        for starts_s, counts in sorted(sums.items())
    ]
    return hours, errors
