"""The index in LMDB: node-local, shared by the processes of one host, kept over restarts.

Owns which tables hold what (``environment.Tables``) and that every change leaves them consistent
after any kill. What makes LMDB itself safe to use is in ``environment``; where its files may live
and who shares them in ``place``; which file is fit to be opened in ``probe``.

Each mutation is one transaction for each ``changes.BATCH_ROWS`` keys, not synced to the disk: a commit costs
no wait for a device, and a file of another boot is never opened.

The interpreter lock: the lmdb module lets go of it around every single get and put, and beside a
Python thread that computes each of them may wait for its turn. A get of 4096 keys then takes several
times as long, and seconds where cores are scarce (``tools/benchmarks/index.py`` shows both columns).
``known_prefix`` therefore asks for a few keys only, and bulk calls belong in a process, or at a time,
whose Python threads are mostly idle.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import ClosedError
from prefixstore.index.base import Address, Entry, Refs, Row, Totals
from prefixstore.index.batch import Batch
from prefixstore.index.changes import learn, parts, remove, touch
from prefixstore.index.environment import MAP_BYTES_MAX, Environment, Transaction
from prefixstore.index.limits import check_mark, gallop
from prefixstore.index.opening import close_in, open_in
from prefixstore.index.place import Host, Seat, claim_seat, this_host
from prefixstore.index.records import Record, RowKey, check_record, namespace_prefix
from prefixstore.index.tables import all_sums, count_of, mark_of, rows_of, write_counts, write_mark
from prefixstore.index.walk import Walk, rows_with_refs
from prefixstore.keys import Key, NamespaceId

__all__ = ["MAP_BYTES", "LmdbIndex"]

MAP_BYTES = 2**30
"""Address space reserved at first; room for three million rows. It doubles when it is full."""

T = TypeVar("T")


class LmdbIndex:
    """An ``Index`` in a node-local LMDB environment.

    Safe for concurrent use by threads and, opened anew in each, by processes. After a fork the child
    must open its own. ``environment.Environment`` has the lock order; this class has no lock.
    """

    has_forgotten = False
    """It grows instead; what it has no room for is an error."""

    def __init__(self, environment: Environment, seat: Seat, *, clock: Clock) -> None:
        """Take over one ``acquire`` of the environment and the seat; ``open`` is the way to make one."""
        self._environment = environment
        self._seat = seat
        self._clock = clock
        self._tables = environment.tables
        self._closed = False

    @classmethod
    def open(
        cls,
        index_dir: str | Path,
        *,
        store_id: str,
        map_bytes: int = MAP_BYTES,
        map_bytes_max: int = MAP_BYTES_MAX,
        discard: bool = False,
        clock: Clock | None = None,
        host: Host | None = None,
    ) -> Self:
        """Open this store's index on this host; a missing or damaged one starts empty.

        Takes some 0.1 s when a child process probes the file first, milliseconds otherwise.

        Args:
            index_dir: A directory on a local filesystem; made if missing.
            store_id: The store's id, as in its ``store.json``.
            map_bytes: Address space reserved at first.
            map_bytes_max: Where the growth of the map ends, and puts with it.
            discard: Start empty whatever is there, because it is suspected of having killed a
                process. Other processes that have it open keep what they have.
            clock: The system's if None.
            host: This host's facts if None.

        Raises:
            InvalidError: ``index_dir`` must not hold an index; see ``place.claim_seat``.
            UnavailableError: It cannot now.
        """
        clock = clock or SystemClock()
        seat = claim_seat(index_dir, store_id=store_id, host=host or this_host(), clock=clock)
        try:
            environment = open_in(
                seat,
                map_bytes=map_bytes,
                map_bytes_max=map_bytes_max,
                discard_first=discard,
                clock=clock,
            )
        except BaseException:
            seat.close()
            raise
        return cls(environment, seat, clock=clock)

    def get_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> list[Record | None]:
        """Return what is known of each key, in order."""
        prefix = namespace_prefix(namespace)
        row_keys = [RowKey(prefix + key) for key in keys]

        def work(txn: Transaction) -> list[Record | None]:
            found = rows_of(txn, self._tables.rows, row_keys)
            return [found[row_key][0] if row_key in found else None for row_key in row_keys]

        return self._read(work)

    def known_prefix(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Return how many leading keys of a chain are known, by galloping."""
        prefix = namespace_prefix(namespace)

        def work(txn: Transaction) -> int:
            return gallop(
                len(keys),
                lambda at: bool(rows_of(txn, self._tables.rows, [RowKey(prefix + keys[at])])),
            )

        return self._read(work)

    def row(self, namespace: NamespaceId, key: Key) -> Row | None:
        """Return the row of ``key`` with its refcounts, or None."""
        row_key = RowKey(namespace_prefix(namespace) + key)
        return self._read(
            lambda txn: next(iter(rows_with_refs(txn, self._tables, [row_key])), None)
        )

    def refs(self, namespace: NamespaceId, key: Key) -> Refs:
        """Return the refcounts of ``key``, whether or not it has a row."""
        row_key = RowKey(namespace_prefix(namespace) + key)

        def work(txn: Transaction) -> Refs:
            found = rows_of(txn, self._tables.rows, [row_key]).get(row_key)
            children = found[1] if found else count_of(txn, self._tables.waiting, row_key)
            return Refs(children, count_of(txn, self._tables.pins, row_key))

        return self._read(work)

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Learn chunks; what is known of them already stays known."""
        self._check_open()
        for part in parts(entries):
            rows = [(RowKey(namespace_prefix(ns) + key), record) for ns, key, record in part]
            self._change(partial(learn, rows=rows))

    def remove_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Forget chunks and return how many had a row."""
        prefix = namespace_prefix(namespace)
        self._check_open()
        removed = 0
        for part in parts(keys):
            removed += self._change(
                partial(remove, row_keys=[RowKey(prefix + key) for key in part])
            )
        return removed

    def touch_many(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        *,
        used_s: int,
        refresh_s: int | None = None,
    ) -> list[Key]:
        """Raise the recency of known keys; return those to touch on disk."""
        prefix = namespace_prefix(namespace)
        check_record(Record(used_s=used_s))
        self._check_open()
        due: list[Key] = []
        for part in parts(keys):
            due += self._change(
                partial(touch, prefix=prefix, keys=part, used_s=used_s, refresh_s=refresh_s)
            )
        return due

    def set_pins(self, pins: Mapping[Address, int]) -> None:
        """Make the pins equal to ``pins``: raise first, then lower."""
        wanted = {RowKey(namespace_prefix(ns) + key): n for (ns, key), n in pins.items() if n > 0}
        held = Walk(self._read, self._tables).pins()
        raised = [(key, n) for key, n in wanted.items() if n > held.get(key, 0)]
        lowered = [(key, wanted.get(key, 0)) for key, n in held.items() if wanted.get(key, 0) < n]
        for part in (*parts(raised), *parts(lowered)):
            self._write(partial(write_counts, table=self._tables.pins, counts=part))

    def oldest_first(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by recency, oldest first, deepest first within a second."""
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        return Walk(self._read, self._tables).by_age(prefix)

    def scan(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows in the order of namespace and key."""
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        return Walk(self._read, self._tables).by_key(prefix)

    def totals(self) -> dict[NamespaceId, Totals]:
        """Return sums for each namespace that has rows, without reading the rows."""
        return self._read(lambda txn: all_sums(txn, self._tables.notes))

    def mark(self, name: str) -> str | None:
        """Return a note set by ``set_mark``, or None."""
        check_mark(name, None)
        return self._read(lambda txn: mark_of(txn, self._tables.notes, name))

    def set_mark(self, name: str, value: str | None) -> None:
        """Keep a small note; None removes it."""
        check_mark(name, value)
        self._write(lambda txn: write_mark(txn, self._tables.notes, name, value))

    def renew(self) -> None:
        """Expect to be told of all chunks anew; none was forgotten."""
        self._check_open()

    def clear(self) -> None:
        """Forget everything, in one transaction; other writers wait for its length."""

        def work(txn: Transaction) -> None:
            for table in self._tables:
                txn.drop(table, delete=False)

        self._write(work)

    @property
    def seat_number(self) -> int:
        """Which of the host's seats this process shares with its PID namespace."""
        return self._seat.number

    def map_bytes(self) -> int:
        """Return the size of the map: address space, an upper bound of the file."""
        self._check_open()
        return self._environment.map_bytes()

    def close(self) -> None:
        """Let go of the environment and the seat; idempotent."""
        if not self._closed:
            self._closed = True
            close_in(self._seat, self._environment, clock=self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Only a warning: the collector may run this inside a lock that closing needs. A child of a
        # fork is not the owner, and ``open`` may have failed before ``__init__``.
        if not getattr(self, "_closed", True) and self._environment.pid == os.getpid():
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)

    def _read(self, work: Callable[[Transaction], T]) -> T:
        self._check_open()
        return self._environment.read(work)

    def _write(self, work: Callable[[Transaction], T]) -> T:
        self._check_open()
        return self._environment.write(work)

    def _change(self, work: Callable[[Batch], T]) -> T:
        """Run ``work`` on the rows of one write transaction."""

        def change(txn: Transaction) -> T:
            batch = Batch(txn, self._tables)
            answer = work(batch)
            batch.flush()
            return answer

        return self._write(change)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the index at {self._environment.path} was closed")
