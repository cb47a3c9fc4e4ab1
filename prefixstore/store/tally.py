"""The running sums of one eviction or removal."""

from collections import Counter

from prefixstore.errors import PrefixStoreError
from prefixstore.policy.eviction import EvictionPlan
from prefixstore.store.values import EvictionReport

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

    def planned(self, plan: EvictionPlan) -> None:
        """Add a plan."""
        self.planned_chunks += len(plan.victims)
        self.planned_bytes += plan.file_bytes
        self.reasons.update(str(victim.reason) for victim in plan.victims)

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
            kept=dict(self.kept),
            short_bytes=short_bytes,
            errors=tuple(self.errors),
        )
