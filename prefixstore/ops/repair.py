"""Repair: make a root and this host's index what they should be, and say what that took.

    1 rebuild   this host's index is forgotten and built anew from the tree
    2 plan      files that are no blobs; chunks that follow nothing; what dead writers left
    3 repair    torn files go into the quarantine, lost chunks go children first, orphans are reaped

A chunk whose parent is not stored cannot be reached in a group of full attention, which is read from its
start. Windows and states are kept without their parents, on purpose; so chunks are dropped only in namespaces
whose manifest says that all groups are of full attention, and only when they are old enough that no writer
can be about to bring the parent. A directory that cannot be read hides parents: then nothing is dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixstore.blob.reasons import MissReason
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import Key, NamespaceId
from prefixstore.ops.removal import RemovalPlan, plan_removal
from prefixstore.ops.removal import carry_out as remove
from prefixstore.store import PrefixStore
from prefixstore.tree.blobs import BlobTree, Miss, ScanEntry
from prefixstore.tree.quarantine import Quarantine

if TYPE_CHECKING:
    from prefixstore.index.base import Row

__all__ = ["RepairPlan", "RepairReport", "carry_out", "plan_repair"]

SETTLED_S = 3600
"""Younger files are left alone: a writer may be about to store the parent, another host's view may lag."""
CHAINED_KINDS = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
"""Kinds of groups, as manifests name them, whose chunks are all needed, from the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What a repair would do, and what the rebuilt index has met.

    Attributes:
        chunks: Chunks of the root.
        file_bytes: What they take.
        torn: Files under a blob's name that are none, old enough to go.
        removals: Chunks that follow nothing, with all that follow them, by namespace.
        kept_chunks: Chunks without their parent that stay: windows, states, what may be one, young
            ones, and what pins need.
        dead_writers: Ids of writers that are dead and not yet forgotten.
        orphan_files: Temporary files that they left.
        errors: Sentences on what could not be read; then no chunk is dropped.
    """

    chunks: int
    file_bytes: int
    torn: tuple[ScanEntry, ...]
    removals: tuple[RemovalPlan, ...]
    kept_chunks: int
    dead_writers: tuple[str, ...]
    orphan_files: int
    errors: tuple[str, ...]

    @property
    def lost_chunks(self) -> int:
        """How many chunks would be dropped."""
        return sum(len(each.chunks) for each in self.removals)

    @property
    def lost_bytes(self) -> int:
        """What that frees."""
        return sum(each.file_bytes for each in self.removals)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair has done.

    Attributes:
        dry_run: It was only told.
        indexed_chunks: Chunks in the rebuilt index, before anything was dropped.
        indexed_bytes: What they take.
        torn_files: Files moved into the quarantine.
        dropped_chunks: Chunks that followed nothing.
        dropped_bytes: What that freed.
        kept_chunks: Chunks without their parent that stay; see ``RepairPlan``.
        dead_writers: Writers forgotten.
        orphan_files: Temporary files removed.
        errors: Sentences on what could not be read or done.
    """

    dry_run: bool
    indexed_chunks: int
    indexed_bytes: int
    torn_files: int
    dropped_chunks: int
    dropped_bytes: int
    kept_chunks: int
    dead_writers: int
    orphan_files: int
    errors: tuple[str, ...]

    @classmethod
    def planned(cls, plan: RepairPlan) -> "RepairReport":
        """Say what a plan would come to."""
        return cls(
            dry_run=True,
            indexed_chunks=plan.chunks,
            indexed_bytes=plan.file_bytes,
            torn_files=len(plan.torn),
            dropped_chunks=plan.lost_chunks,
            dropped_bytes=plan.lost_bytes,
            kept_chunks=plan.kept_chunks,
            dead_writers=len(plan.dead_writers),
            orphan_files=plan.orphan_files,
            errors=plan.errors,
        )


def plan_repair(store: PrefixStore) -> RepairPlan:
    """Rebuild the index that ``store`` was opened with, and plan the rest; nothing in the root changes.

    Args:
        store: The root. For a dry run it is opened read-only, with an index in memory.
    """
    store.hints.clear()
    scan = store.reconcile()
    errors = list(scan.errors)
    now_s = store.server_now_s()
    removals: list[RemovalPlan] = []
    kept = 0
    try:
        for namespace in store.root.namespaces():
            lost, spared = _parentless(store, namespace, now_s=now_s)
            kept += spared
            if lost:
                removal = plan_removal(store, namespace=namespace, keys=lost)
                kept += removal.pinned_chunks
                removals.append(removal)
    except PrefixStoreError as error:
        errors.append(str(error))
    dead_writers: tuple[str, ...] = ()
    orphan_files = 0
    try:
        reaped = store.reap(dry_run=True)
        dead_writers, orphan_files = reaped.writers, reaped.files
        errors += reaped.unread
    except PrefixStoreError as error:
        errors.append(str(error))
    torn = (entry for entry in scan.torn if now_s - entry.modified_s > SETTLED_S)
    return RepairPlan(
        chunks=scan.blobs - len(scan.torn),
        file_bytes=scan.file_bytes - sum(entry.file_bytes for entry in scan.torn),
        torn=tuple(torn),
        removals=() if errors else tuple(removals),
        kept_chunks=kept,
        dead_writers=dead_writers,
        orphan_files=orphan_files,
        errors=tuple(errors),
    )


def carry_out(store: PrefixStore, plan: RepairPlan) -> RepairReport:
    """Do what a plan names; what has changed since it was made is looked at once more.

    Args:
        store: The root, not read-only, whose index was rebuilt by the plan.
        plan: From ``plan_repair`` with this store.
    """
    errors = list(plan.errors)
    torn = _move_torn(store, plan.torn, errors)
    chunks = freed_bytes = 0
    for removal in plan.removals:
        try:
            reports = remove(store, removal) if _still_lost(store, removal) else []
        except PrefixStoreError as error:
            errors.append(str(error))
            continue
        chunks += sum(report.evicted_chunks for report in reports)
        freed_bytes += sum(report.freed_bytes for report in reports)
        errors += [error for report in reports for error in report.errors]
    writers = files = 0
    try:
        reaped = store.reap()
        writers, files = len(reaped.writers), reaped.files
        errors += [error for error in reaped.unread if error not in errors]
    except PrefixStoreError as error:
        errors.append(str(error))
    return RepairReport(
        dry_run=False,
        indexed_chunks=plan.chunks,
        indexed_bytes=plan.file_bytes,
        torn_files=torn,
        dropped_chunks=chunks,
        dropped_bytes=freed_bytes,
        kept_chunks=plan.kept_chunks,
        dead_writers=writers,
        orphan_files=files,
        errors=tuple(errors),
    )


def _parentless(store: PrefixStore, namespace: NamespaceId, *, now_s: int) -> tuple[list[Key], int]:
    """Return the chunks that nothing leads to and that may go, and how many others stay."""
    rows: dict[Key, Row] = {row.key: row for row in store.hints.scan(namespace)}
    lost = [row for row in rows.values() if row.record.parent and row.record.parent not in rows]
    if not lost:
        return [], 0
    manifest = store.root.manifest(namespace)
    if manifest is None or not _is_chained(manifest.fields):
        return [], len(lost)
    settled = [row.key for row in lost if now_s - row.record.used_s > SETTLED_S]
    return settled, len(lost) - len(settled)


def _is_chained(fields: Mapping[str, object]) -> bool:
    """Whether a manifest says that every group of its namespace is read from its start."""
    groups = fields.get("groups")
    if not isinstance(groups, list) or not groups:
        return False
    return all(isinstance(each, dict) and each.get("kind") in CHAINED_KINDS for each in groups)


def _still_lost(store: PrefixStore, removal: RemovalPlan) -> bool:
    """Whether no chunk that starts a lost branch has got its parent since.

    Raises:
        UnavailableError: The filesystem does not say.
    """
    going = {key for _, key in removal.chunks}
    for namespace, key in removal.chunks:
        row = store.hints.row(namespace, key)
        parent = row.record.parent if row is not None else None
        if parent is None or parent in going:
            continue
        if store.tree.probe(namespace, parent) is not None:
            return False
    return True


def _move_torn(store: PrefixStore, torn: tuple[ScanEntry, ...], errors: list[str]) -> int:
    quarantine = Quarantine(store.root, bytes_max=store.config.quarantine_bytes_max)
    moved = 0
    for entry in torn:
        try:
            if _is_no_blob(store.tree, entry):
                moved += quarantine.take(entry.namespace, entry.key, MissReason.TORN)
        except PrefixStoreError as error:
            errors.append(str(error))
    return moved


def _is_no_blob(tree: BlobTree, entry: ScanEntry) -> bool:
    """Whether a file is still no blob: somebody may have stored its key anew."""
    header = tree.read_header(entry.namespace, entry.key)
    is_damaged = isinstance(header, Miss) and header.reason is MissReason.HEADER
    return is_damaged or tree.is_torn(entry.namespace, entry.key)
