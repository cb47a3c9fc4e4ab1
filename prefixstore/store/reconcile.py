"""Bring the index in line with the tree: the one direction in which knowledge flows.

Both sides come in the order of their keys, so they are merged like two sorted lists, one leaf
directory at a time, in bounded memory:

    tree   a     c  d        e
    index  a  b     d'       e
              │  │  │
              │  │  └ another size: header read again
              │  └ unknown: header read, row added
              └ vanished: looked at once more, row removed

A known blob costs its share of a directory listing and a stat, an unknown one a read of its header
besides. A scan of a directory is not of one moment, so what seems to have vanished is looked at again:
it may have been published after its directory was listed.

A few directories and headers that cannot be read are passed over: what they hide is too little for the rest to
wait until somebody has mended a disk. A host that cannot read more than a few ends its scan.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prefixstore.blob.header import BlobHeader, file_bytes
from prefixstore.blob.reasons import MissReason
from prefixstore.errors import PrefixStoreError, UnavailableError
from prefixstore.index.base import Entry, Row
from prefixstore.index.records import COUNT_MAX, Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.hints import LOST, PARTIAL, Hints
from prefixstore.tree.blobs import BlobTree, Miss, ScanEntry

__all__ = ["COMPLETE_MARK", "ReconcileReport", "reconcile", "record_of"]

COMPLETE_MARK = "complete"
"""Set in an index that has met every blob of the root once; without it, the index is being built."""
CURSOR_MARK = "scan_cursor"
"""Set in an index during its first scan: the last directory that was done, ``namespace/aa/bb``."""
CURSOR_DIRECTORIES = 64
"""Directories between two notes of the cursor: what a scan that was cut short has to do again at most, some
milliseconds, for a transaction each."""
ERRORS_KEPT = 8
TORN_KEPT = 2**16
"""A power cut can tear every file of its last minutes; the next scan meets the rest."""
HIDDEN_MAX = 16
"""Directories and headers to pass over. Chunks that nobody sees count for no parent: an eviction may leave so
many directories' chunks, of 65536, without what they follow. Each can take as long as a mount takes to fail."""
PUT_ROWS = 1024
"""Rows to collect before they are put: one transaction for several directories."""


@dataclass(slots=True, kw_only=True)
class ReconcileReport:
    """What a reconciliation met.

    Attributes:
        blobs: Blobs seen in the tree.
        file_bytes: Their files' lengths.
        by_namespace: The same, by namespace.
        added: Rows that were new.
        removed: Rows whose blob is gone.
        unindexed: Bytes of files that got no row, by namespace: torn or damaged, of a later version, or
            more than an index in memory holds.
        torn: Files in the place of a blob whose length or header is not a blob's.
        generation: What the index was that was told; see ``Hints.generation``.
        hidden: Directories and headers that could not be read and were passed over.
        finished: Every directory was read to its end.
        cut_short: The scan ended before the end of the root: what it has not met is any number of chunks.
        resumed: An earlier scan had read the first of them: what it met is not in these figures.
        errors: Sentences on what could not be read; the first few.
    """

    generation: str = ""
    blobs: int = 0
    file_bytes: int = 0
    by_namespace: Counter[NamespaceId] = field(default_factory=Counter)
    added: int = 0
    removed: int = 0
    unindexed: Counter[NamespaceId] = field(default_factory=Counter)
    torn: list[ScanEntry] = field(default_factory=list)
    hidden: int = 0
    finished: bool = True
    cut_short: bool = False
    resumed: bool = False
    errors: list[str] = field(default_factory=list)

    def tore(self, entry: ScanEntry) -> None:
        """Note a file that is no blob, though it has a blob's name."""
        if len(self.torn) < TORN_KEPT:
            self.torn.append(entry)

    def stopped(self) -> None:
        """Note that the scan has ended before its end."""
        self.finished, self.cut_short = False, True

    def failed(self, error: PrefixStoreError) -> None:
        """Note what has ended the scan before its end."""
        self.stopped()
        self._tell(error)

    def hide(self, error: PrefixStoreError) -> None:
        """Note what could not be read and is passed over.

        Raises:
            PrefixStoreError: ``error``, if it is one too many.
        """
        if self.hidden == HIDDEN_MAX:
            raise error
        self.hidden += 1
        self._tell(error)

    def _tell(self, error: PrefixStoreError) -> None:
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(str(error))


_START = ("", "")
"""Stands before every directory."""


def record_of(header: BlobHeader, *, used_s: int, touched_s: int) -> Record:
    """Return the row of a blob whose header was read; times as in ``Record``."""
    return Record(
        file_bytes=file_bytes(header.stored_bytes),
        raw_bytes=header.raw_bytes,
        # A checksum fits any number: a forged header must not stop a scan.
        end_token=min(header.end_token, COUNT_MAX),
        parent=header.parent,
        used_s=used_s,
        touched_s=touched_s,
    )


def reconcile(
    tree: BlobTree,
    hints: Hints,
    *,
    gone: Callable[[NamespaceId, Sequence[Key]], None],
    stop: Callable[[], bool] = lambda: False,
    resume: bool = False,
) -> ReconcileReport:
    """Compare all namespaces with the index and correct the index.

    Args:
        tree: The truth.
        hints: The index.
        gone: Told of chunks whose row was removed.
        stop: Asked before each directory; True ends the scan early and leaves the rest as it was.
        resume: Go on where the first scan of this index was cut short, if it was. False starts anew: who
            evicts must know all children that other hosts have stored meanwhile.

    Returns:
        What was met. Never raises for what a filesystem does: the report says what is missing.
    """
    report = ReconcileReport(generation=hints.generation())
    try:
        # Namespaces of the index, too: a directory that is gone leaves rows behind.
        namespaces = {*tree.root.namespaces(), *hints.totals()}
    except PrefixStoreError as error:
        report.failed(error)
        return report
    done_namespace, after = _cursor(hints) if resume else ("", _START)
    report.resumed = done_namespace != ""
    if not report.resumed:
        if hints.has_forgotten:
            # It is told anew what it had no room for; until that has ended it knows some of it.
            hints.set_mark(COMPLETE_MARK, None)
        hints.renew()
    for namespace in sorted(namespaces):
        if namespace >= done_namespace:
            merge = _Merge(tree, hints, namespace, report, gone=gone, stop=stop)
            merge.run(after=after if namespace == done_namespace else _START)
    if hints.generation() != report.generation:
        # What it was told before that is not in it.
        report.failed(UnavailableError(LOST))
    elif report.finished:
        # Of an index without room for all, too: from there the next scan would meet the end only.
        hints.set_mark(CURSOR_MARK, None)
        if hints.has_forgotten:
            _tell_partial(report, hints)
        else:
            hints.set_mark(COMPLETE_MARK, "1")
    return report


def _tell_partial(report: ReconcileReport, hints: Hints) -> None:
    """Say that the index had no room for all of the root, and for how much it had none."""
    rows = {namespace: totals.file_bytes for namespace, totals in hints.totals().items()}
    report.unindexed = report.by_namespace - Counter(rows)
    report.errors.append(PARTIAL)


def _cursor(hints: Hints) -> tuple[str, tuple[str, str]]:
    """Return the namespace and the directory at which the first scan of an index was cut short.

    An index that is complete is always scanned from the start: what changed meanwhile is what is asked.
    """
    mark = hints.mark(CURSOR_MARK)
    if mark is None or hints.mark(COMPLETE_MARK) is not None:
        return "", _START
    namespace, outer, inner = mark.split("/")
    return namespace, (outer, inner)


class _Merge:
    """The merge of one namespace; used once."""

    def __init__(
        self,
        tree: BlobTree,
        hints: Hints,
        namespace: NamespaceId,
        report: ReconcileReport,
        *,
        gone: Callable[[NamespaceId, Sequence[Key]], None],
        stop: Callable[[], bool],
    ) -> None:
        self._tree = tree
        self._hints = hints
        self._namespace = namespace
        self._report = report
        self._gone = gone
        self._stop = stop
        self._rows: Iterator[Row] = hints.scan(namespace)
        self._head = next(self._rows, None)
        self._new: list[Entry] = []
        # What was not read in full must not be passed over by the scan that goes on from here.
        self._notes_cursor = report.finished and hints.mark(COMPLETE_MARK) is None

    def run(self, *, after: tuple[str, str]) -> None:
        """Merge directory by directory, from the one that follows ``after``."""
        for _ in self._rows_through("".join(after)):
            pass  # An earlier scan has compared them.
        try:
            directories = self._tree.scan(self._namespace, after=after, pass_over=self._pass_over)
            for number, ((outer, inner), entries) in enumerate(directories, 1):
                if self._stop():
                    self._report.stopped()
                    break
                fan = bytes.fromhex(outer + inner)
                # Rows before this directory belong to directories that are not there.
                self._vanished([row.key for row in self._rows_until(fan)])
                self._leaf(entries, {row.key: row.record for row in self._rows_of(fan)})
                if self._notes_cursor and number % CURSOR_DIRECTORIES == 0:
                    self._put(at_least=1)
                    self._hints.set_mark(CURSOR_MARK, f"{self._namespace}/{outer}/{inner}")
            else:
                self._vanished([row.key for row in self._rows_until(b"\xff" * 3)])
        except PrefixStoreError as error:
            self._report.failed(error)
        self._put(at_least=1)

    def _pass_over(self, directory: tuple[str, str], error: PrefixStoreError) -> None:
        """Leave what is known of a directory that cannot be read as it is.

        Raises:
            PrefixStoreError: ``error``, if the scan is to end here.
        """
        if self._stop():
            raise error
        self._hide(error)
        self._report.finished = False
        fan = bytes.fromhex("".join(directory))
        self._vanished([row.key for row in self._rows_until(fan)])
        for _ in self._rows_of(fan):
            pass

    def _hide(self, error: PrefixStoreError) -> None:
        self._report.hide(error)
        self._notes_cursor = False

    def _rows_through(self, digits: str) -> Iterator[Row]:
        """Yield the rows of all directories up to one, that one included."""
        fan = bytes.fromhex(digits)
        while fan and self._head is not None and self._head.key[: len(fan)] <= fan:
            yield self._head
            self._head = next(self._rows, None)

    def _rows_until(self, fan: bytes) -> Iterator[Row]:
        while self._head is not None and self._head.key[: len(fan)] < fan:
            yield self._head
            self._head = next(self._rows, None)

    def _rows_of(self, fan: bytes) -> Iterator[Row]:
        while self._head is not None and self._head.key[: len(fan)] == fan:
            yield self._head
            self._head = next(self._rows, None)

    def _leaf(self, entries: list[ScanEntry], known: dict[Key, Record]) -> None:
        for entry in entries:
            record = known.pop(entry.key, None)
            self._report.blobs += 1
            self._report.file_bytes += entry.file_bytes
            self._report.by_namespace[self._namespace] += entry.file_bytes
            used_s = min(max(0, int(entry.modified_s)), COUNT_MAX)
            if record is None or record.raw_bytes == 0 or record.file_bytes != entry.file_bytes:
                self._learn(entry, used_s=used_s, known=record)
            elif used_s > record.used_s:
                # Another host used it and touched it on disk.
                self._new.append(
                    (self._namespace, entry.key, Record(used_s=used_s, touched_s=used_s))
                )
        self._vanished(list(known))
        self._put(at_least=PUT_ROWS)

    def _learn(self, entry: ScanEntry, *, used_s: int, known: Record | None) -> None:
        header = self._tree.read_header(self._namespace, entry.key)
        if isinstance(header, Miss) or file_bytes(header.stored_bytes) != entry.file_bytes:
            if isinstance(header, Miss) and header.reason is MissReason.ABSENT:
                return
            if isinstance(header, Miss) and header.reason is MissReason.IO:
                self._hide(UnavailableError(header.detail))
            # A row that it has from better days is counted already.
            counted = known.file_bytes if known is not None else 0
            self._report.unindexed[self._namespace] += entry.file_bytes - counted
            if not isinstance(header, Miss) or header.reason in (
                MissReason.TORN,
                MissReason.HEADER,
            ):
                self._report.tore(entry)
            return
        self._report.added += known is None
        record = record_of(header, used_s=used_s, touched_s=used_s)
        self._new.append((self._namespace, entry.key, record))

    def _vanished(self, keys: list[Key]) -> None:
        gone = [key for key in keys if self._tree.probe(self._namespace, key) is None]
        if gone:
            self._report.removed += self._hints.remove_many(self._namespace, gone)
            self._gone(self._namespace, gone)

    def _put(self, *, at_least: int) -> None:
        if len(self._new) >= at_least:
            self._hints.put_many(self._new)
            self._new = []
