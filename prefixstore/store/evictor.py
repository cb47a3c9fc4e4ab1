"""Eviction of a whole root: learn what is there, plan, then carry the plan out, leaves first.

    1 flush recency      what was used a moment ago must not look old
    2 reconcile          blobs of other hosts get rows, rows without a blob go: children are counted right
    3 read the pins      the files are the truth
    4 plan               pure: prefixstore.policy.eviction
    5 for each victim    look at its refcount once more; remove its row; unlink its blob

The row goes before the blob. A crash between the two leaves a blob that no index promises: it is still
served to whoever probes for it, and the next reconciliation finds it again. The other order would leave
a row without a blob: a promise that a load cannot keep, for which the engine reserves memory in vain.
Since victims come children first, a crash at any point leaves whole prefixes.
"""

import errno
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from prefixstore.errors import PrefixStoreError, UnavailableError
from prefixstore.index.base import Address, Row
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import Candidate, EvictionPlan, Victim, plan_eviction
from prefixstore.store.keeper import Keeper
from prefixstore.store.parts import Parts
from prefixstore.store.reconcile import ReconcileReport, reconcile
from prefixstore.store.values import EvictionReport
from prefixstore.tree.blobs import ScanEntry

__all__ = ["Evictor"]

LOG = logging.getLogger(__name__)

PINS_EVERY = 256
"""Victims between two looks at the pin files: a pin takes effect within this many."""
ERRORS_MAX = 16
"""Unlinks that may fail before a plan is given up: a root that cannot be written fails them all."""
TORN_AGE_S = 3600
"""Torn files younger than this are left: another host's view of a fresh file may lag behind."""


class Evictor:
    """Evicts from one root.

    Safe for concurrent use, by several hosts, too: two evictions at once remove no more than each
    plans, and meet each other's victims as already gone.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        namespace: NamespaceId | None,
        keeper: Keeper | None,
    ) -> None:
        self._namespace = namespace
        self._keeper = keeper
        self._tree = parts.tree
        self._hints = parts.hints
        self._pins = parts.pins
        self._inflight = parts.inflight
        self._membership = parts.membership
        self._counters = parts.counters
        self._present = parts.present

    def evict(
        self,
        target_bytes: Callable[[int], int],
        *,
        max_age_s: float | None,
        dry_run: bool,
        scan: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> EvictionReport:
        """Evict down to a usage, and what is too old.

        Args:
            target_bytes: Says for the usage found down to which usage to evict.
            max_age_s: Evict what was not used for so long, whatever the usage; None for no such limit.
            dry_run: Plan only.
            scan: Reconcile first; False trusts the index, after a dry run a moment ago.
            stop: Asked before each directory and victim; True ends the eviction early.
        """
        run = _Run(dry_run=dry_run)
        if self._keeper is not None:
            self._keeper.flush()
        if scan:
            report = reconcile(self._tree, self._hints, stop=stop)
            run.errors += report.errors
            if not dry_run:
                self._remove_torn(report)
        try:
            if not dry_run:
                self._membership.announce()
            held = self._pins.held(now_s=self._membership.now_s())
        except PrefixStoreError as error:
            # Without the pins nothing may go: what they hold is not to be guessed.
            run.errors.append(str(error))
            return run.report(self._totals(), short_bytes=0)
        self._hints.set_pins(held)
        target = target_bytes(self._totals()[1])
        while True:
            plan = self._plan(target, max_age_s=max_age_s)
            run.planned(plan)
            evicted_before = run.evicted_chunks
            if not dry_run:
                self._carry_out(plan, run, stop)
            made_progress = run.evicted_chunks > evicted_before
            if not plan.truncated or not made_progress or run.gave_up or stop():
                break
        if not dry_run:
            self._pins.remove_ended(now_s=self._membership.now_s())
        return run.report(self._totals(), short_bytes=plan.short_bytes)

    def remove(
        self, namespace: NamespaceId, keys: Sequence[Key], *, dry_run: bool
    ) -> EvictionReport:
        """Remove single chunks; pinned ones and those in flight stay.

        Raises:
            PrefixStoreError: The pins cannot be read.
        """
        run = _Run(dry_run=dry_run)
        if self._keeper is not None:
            self._keeper.flush()
        held = self._pins.held(now_s=self._membership.now_s())
        for key in keys:
            kept = self._kept((namespace, key), held)
            if kept is not None:
                run.kept[kept] += 1
                continue
            size = self._size(namespace, key)
            if size is None:
                run.kept["absent"] += 1
                continue
            run.planned_chunks += 1
            run.planned_bytes += size
            run.reasons["asked"] += 1
            if not dry_run:
                self._remove_one(namespace, key, size, run)
        return run.report(self._totals(), short_bytes=0)

    def _plan(self, target_bytes: int, *, max_age_s: float | None) -> EvictionPlan:
        used_bytes = self._totals()[1]
        used_before_s = 0
        if max_age_s is not None:
            used_before_s = max(0, int(self._membership.now_s() - max_age_s))
        return plan_eviction(
            (_candidate(row) for row in self._hints.oldest_first() if not row.record.presumed),
            find=self._find,
            busy=lambda namespace, key: (namespace, key) in self._inflight,
            free_bytes=max(0, used_bytes - target_bytes),
            used_before_s=used_before_s,
        )

    def _find(self, namespace: NamespaceId, key: Key) -> Candidate | None:
        row = self._hints.row(namespace, key)
        return None if row is None or row.record.presumed else _candidate(row)

    def _carry_out(self, plan: EvictionPlan, run: "_Run", stop: Callable[[], bool]) -> None:
        held: dict[Address, int] = {}
        for at, victim in enumerate(plan.victims):
            if run.gave_up or stop():
                return
            if at % PINS_EVERY == 0:
                try:
                    held = self._pins.held(now_s=self._membership.now_s())
                except PrefixStoreError as error:
                    run.failed(error)
                    run.gave_up = True
                    return
            kept = self._kept((victim.namespace, victim.key), held) or self._changed(victim)
            if kept is not None:
                run.kept[kept] += 1
            else:
                self._remove_one(victim.namespace, victim.key, victim.file_bytes, run)

    def _kept(self, address: Address, held: dict[Address, int]) -> str | None:
        if address in held:
            return "pinned"
        return "in_flight" if address in self._inflight else None

    def _changed(self, victim: Victim) -> str | None:
        """Say what has happened to a victim since the plan was made, None if nothing has."""
        row = self._hints.row(victim.namespace, victim.key)
        if row is None:
            return "gone"
        if row.refs.children:
            return "has_children"
        return "used_meanwhile" if row.record.used_s > victim.used_s else None

    def _remove_one(self, namespace: NamespaceId, key: Key, size: int, run: "_Run") -> None:
        (record,) = self._hints.get_many(namespace, [key])
        self._hints.remove_many(namespace, [key])
        # A crash here leaves a blob without a row: found again by probing and by the next scan.
        try:
            # "Not there" may be a server that forgot our handle: believed only after another look, or
            # the chunk's parent would go before it.
            was_there = self._tree.unlink(namespace, key) or self._is_still_there(namespace, key)
        except PrefixStoreError as error:
            # Still there, so still counted.
            if record is not None:
                self._hints.put_many([(namespace, key, record)])
            run.failed(error)
            return
        if namespace == self._namespace:
            self._present.forget((key,))
        if not was_there:
            run.kept["gone"] += 1
            return
        run.evicted_chunks += 1
        run.freed_bytes += size
        self._counters.add(evicted=1, evicted_bytes=size)

    def _is_still_there(self, namespace: NamespaceId, key: Key) -> bool:
        """Look whether a blob survived its unlinking; say False if it is gone.

        Raises:
            UnavailableError: It is still there, or nobody knows.
        """
        if self._tree.probe(namespace, key) is None:
            return False
        path = self._tree.root.layout.blob(namespace, key)
        raise UnavailableError(errno.ESTALE, f"{path} is still there after it was removed")

    def _size(self, namespace: NamespaceId, key: Key) -> int | None:
        (record,) = self._hints.get_many(namespace, [key])
        if record is not None and record.file_bytes:
            return record.file_bytes
        try:
            return self._tree.probe(namespace, key)
        except PrefixStoreError:
            return None

    def _remove_torn(self, report: ReconcileReport) -> None:
        """Remove files that a power cut left under a blob's name: nothing can be read from them."""
        now_s = self._membership.now_s()
        for entry in report.torn:
            if now_s - entry.modified_s > TORN_AGE_S and self._is_torn(entry):
                try:
                    self._tree.unlink(entry.namespace, entry.key)
                except PrefixStoreError as error:
                    LOG.warning("a torn blob stays: %s", error)
                    return
                self._counters.add(torn_removed=1)

    def _is_torn(self, entry: ScanEntry) -> bool:
        """Whether the file is still short of a blob's shape: a writer may have replaced it."""
        try:
            return self._tree.probe(entry.namespace, entry.key) is None
        except PrefixStoreError:
            return False

    def _totals(self) -> tuple[int, int]:
        totals = self._hints.totals().values()
        return sum(t.chunks - t.presumed for t in totals), sum(t.file_bytes for t in totals)


def _candidate(row: Row) -> Candidate:
    return Candidate(
        namespace=row.namespace,
        key=row.key,
        parent=row.record.parent,
        file_bytes=row.record.file_bytes,
        used_s=row.record.used_s,
        end_token=row.record.end_token,
        children=row.refs.children,
        pins=row.refs.pins,
    )


class _Run:
    """The running sums of one eviction; used by one thread."""

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

    def failed(self, error: PrefixStoreError) -> None:
        """Note a failure; too many end the run."""
        self._failures += 1
        self.kept["error"] += 1
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(str(error))
        self.gave_up = self._failures >= ERRORS_MAX

    def report(self, totals: tuple[int, int], *, short_bytes: int) -> EvictionReport:
        """Freeze the sums."""
        chunks, file_bytes = totals
        # A dry run says what would be left.
        planned = (self.planned_chunks, self.planned_bytes) if self.dry_run else (0, 0)
        return EvictionReport(
            dry_run=self.dry_run,
            planned_chunks=self.planned_chunks,
            planned_bytes=self.planned_bytes,
            evicted_chunks=self.evicted_chunks,
            freed_bytes=self.freed_bytes,
            left_chunks=chunks - planned[0],
            left_bytes=file_bytes - planned[1],
            reasons=dict(self.reasons),
            kept=dict(self.kept),
            short_bytes=short_bytes,
            errors=tuple(self.errors),
        )
