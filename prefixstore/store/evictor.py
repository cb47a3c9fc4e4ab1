"""Eviction of a whole root: learn what is there, plan, then carry the plan out, leaves first.

1 flush recency      what was used a moment ago must not look old
2 reconcile          blobs of other hosts get rows, rows without a blob go: children are counted right
3 read the pins      the files are the truth
4 plan               pure: prefixstore.policy.eviction
5 for some victims   look at their refcounts once more, then remove them: prefixstore.store.remover
6 plan again         without what could not be removed, until what is asked for is free
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from prefixstore.errors import InvalidError, PrefixStoreError, UnavailableError
from prefixstore.index.base import Address, Row
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import Candidate, EvictionPlan, Victim, plan_eviction
from prefixstore.store.hints import LOST, PARTIAL
from prefixstore.store.keeper import Keeper
from prefixstore.store.parts import Parts
from prefixstore.store.reconcile import COMPLETE_MARK, ReconcileReport, reconcile
from prefixstore.store.remover import Doomed, Remover
from prefixstore.store.tally import Failures, Tally
from prefixstore.store.values import EvictionReport

__all__ = ["Evictor"]

LOG = logging.getLogger(__name__)

BATCH_VICTIMS = 256
"""Victims between two looks at the pin files, the refcounts and whether to stop: some 50 ms of work, and
rows enough to share a transaction."""
SCANS_MAX = 2
"""An index that is cleared, or fails, in the middle of a scan is told of everything once more, no more often."""
TORN_AGE_S = 3600
"""Torn files younger than this are left: another host's view of a fresh file may lag behind."""


def _nothing(_used: dict[NamespaceId, int]) -> dict[NamespaceId, int]:
    return {}


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
        self._keeper = keeper
        self._tree = parts.tree
        self._hints = parts.hints
        self._pins = parts.pins
        self._inflight = parts.inflight
        self._membership = parts.membership
        self._counters = parts.counters
        self._usage = parts.usage
        self._gone = parts.gone
        self._remover = Remover(parts, namespace=namespace)
        # Replaced whole: of the last scan.
        self._scanned: ReconcileReport | None = None

    def reconcile(
        self, *, stop: Callable[[], bool] = lambda: False, resume: bool = False
    ) -> ReconcileReport:
        """Bring the index in line with the tree; ends early when ``stop`` says so.

        ``resume`` lets the first scan of an index go on where an earlier process left it.
        """
        if self._keeper is not None:
            self._keeper.flush()
        mark = self._usage.begin_scan()
        for _ in range(SCANS_MAX):
            report = reconcile(self._tree, self._hints, stop=stop, gone=self._gone, resume=resume)
            if self._is_whole(report) or stop():
                break
            # The index that took the place of one that failed half way knows the other half only.
            resume = False
        if report.finished and not report.resumed:
            self._usage.end_scan(mark, report.by_namespace)
        self._scanned = report
        return report

    def check_whole(self) -> None:
        """Refuse a question about all of the root that the index could not answer as it was last reconciled.

        Raises:
            InvalidError: It had no room for all that it was told.
            UnavailableError: It was cleared or has failed since.
        """
        if self._hints.has_forgotten:
            raise InvalidError(PARTIAL)
        if self._scanned is not None and not self._is_whole(self._scanned):
            raise UnavailableError(LOST)

    def evict(
        self,
        target_bytes: Callable[[int], int],
        *,
        namespace_bytes: Callable[[dict[NamespaceId, int]], dict[NamespaceId, int]] = _nothing,
        max_age_s: float | None,
        dry_run: bool,
        scan: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> EvictionReport:
        """Evict down to a usage, and what is too old.

        Args:
            target_bytes: Says for the usage found down to which usage to evict.
            namespace_bytes: Says for the usage of namespaces how much each has to give.
            max_age_s: Evict what was not used for so long, whatever the usage; None for no such limit.
            dry_run: Plan only.
            scan: Reconcile first; False trusts the index, after a dry run a moment ago.
            stop: Asked before each directory and victim; True ends the eviction early.
        """
        tally = Tally(dry_run=dry_run)
        if self._keeper is not None:
            self._keeper.flush()
        scanned = self.reconcile(stop=stop) if scan else self._known()
        tally.errors += scanned.errors
        if scanned.cut_short and self._hints.mark(COMPLETE_MARK) is None:
            # Any number of chunks may follow those that it knows.
            return self._report(tally)
        if not dry_run:
            self._remove_torn(scanned)
        unindexed = scanned.unindexed
        if not dry_run and not self._knows_time(tally, wanted=max_age_s is not None):
            max_age_s = None
        try:
            held = self._pins.held(now_s=self._membership.now_s() if dry_run else self._pins_at_s())
        except PrefixStoreError as error:
            # Without the pins nothing may go: what they hold is not to be guessed.
            tally.errors.append(str(error))
            return self._report(tally)
        self._hints.set_pins(held)
        # What has no row cannot go, and takes room: the rest makes up for it.
        rows = Counter({name: t.file_bytes for name, t in self._hints.totals().items()})
        used = rows + unindexed
        target = target_bytes(used.total()) - unindexed.total()
        own_targets = {
            name: rows[name] - give for name, give in namespace_bytes(dict(used)).items()
        }
        while True:
            plan = self._plan(target, own_targets, tally.failures, max_age_s=max_age_s)
            tally.planned(plan)
            evicted_before, failed_before = tally.evicted_chunks, tally.failures.count
            if not dry_run:
                self._carry_out(plan, scanned, tally, stop)
            has_more = plan.truncated and tally.evicted_chunks > evicted_before
            # What failed keeps its place among the oldest, and is planned by no further plan of this run.
            has_failed = tally.failures.count > failed_before
            if not (has_more or has_failed) or tally.gave_up or stop():
                break
        if not dry_run:
            self._pins.remove_ended(now_s=self._pins_at_s())
            self._usage.exchange(step_bytes=1)
        return self._report(tally, short_bytes=plan.short_bytes)

    def remove(
        self, namespace: NamespaceId, keys: Sequence[Key], *, dry_run: bool
    ) -> EvictionReport:
        """Remove single chunks, in the order given; pinned ones and those in flight stay.

        Raises:
            PrefixStoreError: The pins cannot be read.
        """
        tally = Tally(dry_run=dry_run)
        if self._keeper is not None:
            self._keeper.flush()
        if not dry_run:
            # By a wrong clock of this host a pin might have ended.
            self._knows_time(tally, wanted=False)
        for at in range(0, len(keys), BATCH_VICTIMS):
            held = self._pins.held(now_s=self._pins_at_s())
            batch = keys[at : at + BATCH_VICTIMS]
            doomed: list[Doomed] = []
            for key, record in zip(batch, self._hints.get_many(namespace, batch), strict=True):
                kept = self._kept((namespace, key), held)
                size = record.file_bytes if record is not None else 0
                if kept is None and not size:
                    size = self._size_on_disk(namespace, key)
                    kept = None if size else "absent"
                if kept is None:
                    doomed.append(Doomed(namespace, key, size, record))
                else:
                    tally.kept[kept] += 1
            tally.planned_chunks += len(doomed)
            tally.planned_bytes += sum(chunk.file_bytes for chunk in doomed)
            tally.reasons["asked"] += len(doomed)
            if not dry_run:
                self._remover.remove(doomed, tally)
        return self._report(tally)

    def _knows_time(self, tally: Tally, *, wanted: bool) -> bool:
        """Learn the file server's time by writing there; return whether that worked.

        A full disk refuses, and has to be evicted from all the same. Only ages cannot be told then: by a
        wrong clock of this host everything might be too old.
        """
        try:
            self._membership.announce()
        except PrefixStoreError as error:
            if wanted:
                tally.errors.append(f"ages are unknown, so nothing is too old: {error}")
            return False
        return True

    def _pins_at_s(self) -> int:
        """Return when pins are looked at: now, or before all time while a full disk hides the server's.

        By a clock of this host's that is ahead they would have ended.
        """
        return self._membership.now_s() if self._membership.knows_time else 0

    def _plan(
        self,
        target_bytes: int,
        own_targets: dict[NamespaceId, int],
        failures: Failures,
        *,
        max_age_s: float | None,
    ) -> EvictionPlan:
        totals = self._hints.totals()
        used_bytes = sum(t.file_bytes for t in totals.values())
        used_before_s = 0
        if max_age_s is not None:
            used_before_s = max(0, int(self._membership.now_s() - max_age_s))
        return plan_eviction(
            (_candidate(row) for row in self._hints.oldest_first() if not row.record.presumed),
            find=self._find,
            busy=lambda namespace, key: (
                (namespace, key) in self._inflight or failures.cover(namespace, key)
            ),
            free_bytes=max(0, used_bytes - target_bytes),
            free_by_namespace={
                name: max(0, totals[name].file_bytes - target)
                for name, target in own_targets.items()
                if name in totals
            },
            used_before_s=used_before_s,
        )

    def _find(self, namespace: NamespaceId, key: Key) -> Candidate | None:
        row = self._hints.row(namespace, key)
        return None if row is None or row.record.presumed else _candidate(row)

    def _carry_out(
        self,
        plan: EvictionPlan,
        scanned: ReconcileReport,
        tally: Tally,
        stop: Callable[[], bool],
    ) -> None:
        victims = plan.victims
        for at in range(0, len(victims), BATCH_VICTIMS):
            if tally.gave_up or stop():
                return
            try:
                held = self._pins.held(now_s=self._pins_at_s())
            except PrefixStoreError as error:
                tally.give_up(str(error))
                return
            doomed = self._still_doomed(victims[at : at + BATCH_VICTIMS], held, tally)
            # After the look at the rows: those of an index that is being filled anew lack children.
            if not self._is_whole(scanned):
                tally.give_up(LOST)
                return
            self._remover.remove(doomed, tally)
            # Those who wait for room hear of it.
            self._usage.exchange()

    def _still_doomed(
        self, victims: Sequence[Victim], held: dict[Address, int], tally: Tally
    ) -> list[Doomed]:
        """Return the victims to which nothing has happened since the plan was made."""
        # A transfer that ends after this is seen in the rows, one that begins later in flight.
        busy = {address for v in victims if (address := (v.namespace, v.key)) in self._inflight}
        if self._keeper is not None:
            # What was stored and used since then keeps what it follows.
            self._keeper.flush()
        doomed: list[Doomed] = []
        going: Counter[Address] = Counter()
        for victim in victims:
            address = (victim.namespace, victim.key)
            if tally.failures.cover(*address):
                tally.kept["error"] += 1
                continue
            row = self._hints.row(*address)
            kept = self._kept(address, held) or _changed(victim, row, going[address])
            if address in busy:
                kept = kept or "in_flight"
            if kept is not None or row is None:
                tally.kept[kept or "gone"] += 1
                continue
            doomed.append(Doomed(victim.namespace, victim.key, victim.file_bytes, row.record))
            if row.record.parent is not None:
                going[victim.namespace, row.record.parent] += 1
        return doomed

    def _kept(self, address: Address, held: dict[Address, int]) -> str | None:
        if address in held:
            return "pinned"
        return "in_flight" if address in self._inflight else None

    def _size_on_disk(self, namespace: NamespaceId, key: Key) -> int:
        """Return a blob's file bytes, 0 if it is not there or nobody knows."""
        try:
            return self._tree.probe(namespace, key) or 0
        except PrefixStoreError:
            return 0

    def _known(self) -> ReconcileReport:
        """Return what the last scan has met; of none, when the caller trusts an index that others filled."""
        return self._scanned or ReconcileReport(generation=self._hints.generation())

    def _is_whole(self, scanned: ReconcileReport) -> bool:
        """Whether the index still holds what a scan told it: all children, above all."""
        return self._hints.generation() == scanned.generation

    def _remove_torn(self, report: ReconcileReport) -> None:
        """Remove files that a power cut left under a blob's name: nothing can be read from them."""
        now_s = self._membership.now_s()
        torn, report.torn = report.torn, []
        failures = Failures()
        for entry in torn:
            if failures.everywhere:
                return
            if now_s - entry.modified_s <= TORN_AGE_S or failures.cover(entry.namespace, entry.key):
                continue
            try:
                # A writer may have replaced it.
                if not self._tree.is_torn(entry.namespace, entry.key):
                    continue
                was_there = self._tree.unlink(entry.namespace, entry.key)
            except PrefixStoreError as error:
                LOG.warning("a torn blob stays: %s", error)
                failures.add(entry.namespace, entry.key)
                continue
            # A row that it had from better days counts in its place.
            (row,) = self._hints.get_many(entry.namespace, [entry.key])
            counted = row.file_bytes if row is not None else 0
            report.unindexed[entry.namespace] -= entry.file_bytes - counted
            self._hints.remove_many(entry.namespace, [entry.key])
            self._gone(entry.namespace, [entry.key])
            if was_there:
                self._usage.removed(entry.namespace, entry.file_bytes)
                self._counters.add(torn_removed=1)

    def _report(self, tally: Tally, *, short_bytes: int = 0) -> EvictionReport:
        chunks, file_bytes = self._totals()
        return tally.report(chunks=chunks, file_bytes=file_bytes, short_bytes=short_bytes)

    def _totals(self) -> tuple[int, int]:
        totals = self._hints.totals().values()
        return sum(t.chunks - t.presumed for t in totals), sum(t.file_bytes for t in totals)


def _changed(victim: Victim, row: Row | None, going_children: int) -> str | None:
    """Say what has happened to a victim since the plan was made, None if nothing has."""
    if row is None:
        return "gone"
    if row.refs.children > going_children:
        return "has_children"
    return "used_meanwhile" if row.record.used_s > victim.used_s else None


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
