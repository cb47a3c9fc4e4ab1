"""The running sums of one eviction or removal."""

from collections import Counter
from typing import TYPE_CHECKING

from prefixstore.errors import PrefixStoreError
from prefixstore.policy.eviction import EvictionPlan
from prefixstore.store.values import EvictionReport, PlannedGroup

if TYPE_CHECKING:
    from prefixstore.keys import NamespaceId

__all__ = ["Tally"]

ERRORS_MAX = 16
"""Removals that may fail before a plan is given up: a root that cannot be written fails them all."""


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
        self._failures = 0
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

    def failed(self, error: PrefixStoreError) -> None:
        """Note a removal that failed; too many end the run."""
        self._failures += 1
        self.kept["error"] += 1
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(str(error))
        self.gave_up = self._failures >= ERRORS_MAX

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
