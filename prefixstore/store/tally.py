"""The running sums of one eviction or removal, and where it failed.

A damaged directory fails the removals of its own chunks, a namespace of another user all of its own, a root
that cannot be written every one. Keys are spread over all directories, so a few failures tell which it is. What
fails is passed over and the rest goes on: or one directory would keep the whole root from being evicted from.
"""

from collections import Counter, defaultdict

from prefixstore.errors import PrefixStoreError
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import EvictionPlan
from prefixstore.store.values import EvictionReport, PlannedGroup

__all__ = ["Failures", "Tally"]

ERRORS_KEPT = 16
LEAF_FAILURES_MAX = 2
OUTER_FAILURES_MAX = 8
OUTERS_MAX = 16
NAMESPACES_MAX = 4
"""Removals that may fail in one directory of blobs, and below one of the 256 directories above them, before
the rest there is not tried any more; below how many of those the whole namespace is not; and for how many
namespaces the run is given up. Each failure can take as long as a mount takes to fail; fewer would take a
damaged directory for more than it is."""


class Failures:
    """Where the removals of one run failed; used by one thread."""

    def __init__(self) -> None:
        self.count = 0
        self._addresses: set[tuple[NamespaceId, Key]] = set()
        self._places: Counter[tuple[NamespaceId, bytes]] = Counter()
        self._outers: defaultdict[NamespaceId, set[bytes]] = defaultdict(set)

    @property
    def everywhere(self) -> bool:
        """Whether it is the root that fails, and not some directories."""
        failed = sum(len(outers) >= OUTERS_MAX for outers in self._outers.values())
        return failed >= NAMESPACES_MAX

    def add(self, namespace: NamespaceId, key: Key) -> None:
        """Note that a chunk could not be removed."""
        self.count += 1
        self._addresses.add((namespace, key))
        self._places.update([(namespace, key[:1]), (namespace, key[:2])])
        self._outers[namespace].add(key[:1])

    def cover(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether a chunk is not to be tried any more: it failed, or too many did beside it."""
        return self.count > 0 and (
            (namespace, key) in self._addresses
            or self._places[namespace, key[:2]] >= LEAF_FAILURES_MAX
            or self._places[namespace, key[:1]] >= OUTER_FAILURES_MAX
            or len(self._outers.get(namespace, ())) >= OUTERS_MAX
        )


class Tally:
    """Sums that end as an ``EvictionReport``; used by one thread."""

    def __init__(self, *, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.planned_chunks = 0
        self.planned_bytes = 0
        self.evicted_chunks = 0
        self.freed_bytes = 0
        self.reasons: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.errors: list[str] = []
        self.gave_up = False
        self.failures = Failures()
        self._groups: dict[tuple[NamespaceId, str], tuple[int, int, int, int]] = {}

    def planned(self, plan: EvictionPlan) -> None:
        """Add a plan."""
        self.planned_chunks += len(plan.victims)
        self.planned_bytes += plan.file_bytes
        self.reasons.update(str(victim.reason) for victim in plan.victims)
        for victim in plan.victims:
            name = (victim.namespace, str(victim.reason))
            before = self._groups.get(name, (0, 0, victim.used_s, victim.used_s))
            chunks, file_bytes, oldest_s, newest_s = before
            self._groups[name] = (
                chunks + 1,
                file_bytes + victim.file_bytes,
                min(oldest_s, victim.used_s),
                max(newest_s, victim.used_s),
            )

    def removed(self, file_bytes: int) -> None:
        """Add a chunk that is gone."""
        self.evicted_chunks += 1
        self.freed_bytes += file_bytes

    def failed(self, namespace: NamespaceId, key: Key, error: PrefixStoreError) -> None:
        """Note a removal that failed; failures in several namespaces end the run."""
        self.failures.add(namespace, key)
        self.kept["error"] += 1
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(str(error))
        self.gave_up = self.gave_up or self.failures.everywhere

    def give_up(self, why: str) -> None:
        """End the run for a reason that lies in no single removal."""
        self.errors.append(why)
        self.gave_up = True

    def _planned_groups(self) -> list[PlannedGroup]:
        return [
            PlannedGroup(
                namespace=namespace,
                reason=reason,
                chunks=chunks,
                file_bytes=file_bytes,
                oldest_s=oldest_s,
                newest_s=newest_s,
            )
            for (namespace, reason), (
                chunks,
                file_bytes,
                oldest_s,
                newest_s,
            ) in self._groups.items()
        ]

    def report(self, *, chunks: int, file_bytes: int, short_bytes: int) -> EvictionReport:
        """Freeze the sums.

        Args:
            chunks: What the root holds now.
            file_bytes: What that takes.
            short_bytes: By how much the plan missed its goal.
        """
        # A dry run says what would be left.
        going_chunks, going_bytes = (
            (self.planned_chunks, self.planned_bytes) if self.dry_run else (0, 0)
        )
        return EvictionReport(
            dry_run=self.dry_run,
            planned_chunks=self.planned_chunks,
            planned_bytes=self.planned_bytes,
            evicted_chunks=self.evicted_chunks,
            freed_bytes=self.freed_bytes,
            left_chunks=chunks - going_chunks,
            left_bytes=file_bytes - going_bytes,
            reasons=dict(self.reasons),
            groups=tuple(sorted(self._planned_groups(), key=lambda group: -group.file_bytes)),
            kept=dict(self.kept),
            short_bytes=short_bytes,
            errors=tuple(self.errors),
        )
