"""The index in LMDB: node-local, shared by the processes of one host, kept over restarts.

Owns which tables hold what (``environment.Tables``) and that every change leaves them consistent
after any kill. What makes LMDB itself safe to use is in ``environment``; where its files may live
and who shares them in ``place``; which file is fit to be opened in ``probe``.

Each mutation is one transaction for each ``BATCH_ROWS`` keys, not synced to the disk: a commit costs
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
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import ClosedError
from prefixstore.index.base import Address, Entry, Refs, Row, Totals
from prefixstore.index.batch import Batch, all_sums, count_of, rows_of
from prefixstore.index.environment import MAP_BYTES_MAX, DamageError, Environment, Transaction
from prefixstore.index.limits import check_mark, gallop
from prefixstore.index.notes import decode_mark, encode_mark, mark_key
from prefixstore.index.opening import close_in, open_in
from prefixstore.index.place import Host, Slot, claim_slot, this_host
from prefixstore.index.records import (
    Record,
    RowKey,
    check_record,
    encode_count,
    merge,
    namespace_prefix,
)
from prefixstore.index.walk import last_place, pinned_rows, rows_by_age, rows_by_key, rows_with_refs
from prefixstore.keys import KEY_BYTES_MAX, Key, NamespaceId

__all__ = ["BATCH_ROWS", "MAP_BYTES", "LmdbIndex"]

MAP_BYTES = 2**30
"""Address space reserved at first; room for three million rows. It doubles when it is full."""

BATCH_ROWS = 4096
"""Rows written in one transaction: fewer cost more commits, more keep other writers waiting."""

T = TypeVar("T")


class LmdbIndex:
    """An ``Index`` in a node-local LMDB environment.

    Safe for concurrent use by threads and, opened anew in each, by processes. After a fork the child
    must open its own. ``environment.Environment`` has the lock order; this class has no lock.
    """

    def __init__(self, environment: Environment, slot: Slot, *, clock: Clock) -> None:
        """Take over one ``acquire`` of the environment and the slot; ``open`` is the way to make one."""
        self._environment = environment
        self._slot = slot
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
            InvalidError: ``index_dir`` must not hold an index; see ``place.claim_slot``.
            UnavailableError: It cannot now.
        """
        clock = clock or SystemClock()
        slot = claim_slot(index_dir, store_id=store_id, host=host or this_host(), clock=clock)
        try:
            environment = open_in(
                slot,
                map_bytes=map_bytes,
                map_bytes_max=map_bytes_max,
                discard_first=discard,
                clock=clock,
            )
        except BaseException:
            slot.close()
            raise
        return cls(environment, slot, clock=clock)

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

            def work(batch: Batch, rows: list[tuple[RowKey, Record]] = rows) -> None:
                batch.load(row_key for row_key, _ in rows)
                for row_key, record in rows:
                    old = batch.record(row_key)
                    if record == old:
                        continue
                    new = merge(old, record) if old else record
                    if new != old:
                        batch.set(row_key, new)

            self._change(work)

    def remove_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Forget chunks and return how many had a row."""
        prefix = namespace_prefix(namespace)
        self._check_open()
        removed = 0
        for part in parts(keys):
            row_keys = [RowKey(prefix + key) for key in part]

            def work(batch: Batch, row_keys: list[RowKey] = row_keys) -> int:
                batch.load(row_keys)
                known = [key for key in dict.fromkeys(row_keys) if batch.record(key) is not None]
                for row_key in known:
                    batch.set(row_key, None)
                return len(known)

            removed += self._change(work)
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

            def work(batch: Batch, part: list[Key] = part) -> list[Key]:
                return touch(batch, prefix, part, used_s=used_s, refresh_s=refresh_s)

            due += self._change(work)
        return due

    def set_pins(self, pins: Mapping[Address, int]) -> None:
        """Make the pins equal to ``pins``: raise first, then lower."""
        wanted = {RowKey(namespace_prefix(ns) + key): n for (ns, key), n in pins.items() if n > 0}
        held = dict(self._pins())
        raised = [(key, n) for key, n in wanted.items() if n > held.get(key, 0)]
        lowered = [(key, wanted.get(key, 0)) for key, n in held.items() if wanted.get(key, 0) < n]
        for part in (*parts(raised), *parts(lowered)):

            def work(txn: Transaction, part: list[tuple[RowKey, int]] = part) -> None:
                for row_key, count in part:
                    if count:
                        txn.put(row_key, encode_count(row_key, count), db=self._tables.pins)
                    else:
                        txn.delete(row_key, db=self._tables.pins)

            self._write(work)

    def oldest_first(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by recency, oldest first, deepest first within a second."""
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        last = self._read(lambda txn: last_place(txn, self._tables.recency))

        def batch(txn: Transaction, start: bytes) -> tuple[list[Row], bytes | None]:
            return rows_by_age(txn, self._tables, prefix=prefix, start=start, last=last)

        return self._walk(batch, start=b"\x00")

    def scan(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows in the order of namespace and key."""
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        end = self._read(lambda txn: last_place(txn, self._tables.rows))
        last = min(end, prefix + b"\xff" * (KEY_BYTES_MAX + 1)) if prefix else end

        def batch(txn: Transaction, start: bytes) -> tuple[list[Row], bytes | None]:
            return rows_by_key(txn, self._tables, start=start, last=last)

        return self._walk(batch, start=prefix or b"\x00")

    def totals(self) -> dict[NamespaceId, Totals]:
        """Return sums for each namespace that has rows, without reading the rows."""
        return self._read(lambda txn: all_sums(txn, self._tables.notes))

    def mark(self, name: str) -> str | None:
        """Return a note set by ``set_mark``, or None."""
        check_mark(name, None)
        key = mark_key(name)

        def work(txn: Transaction) -> str | None:
            value = txn.get(key, db=self._tables.notes)
            if value is None:
                return None
            text = decode_mark(key, value)
            if text is None:
                raise DamageError(f"the mark {name!r} fails its check")
            return text

        return self._read(work)

    def set_mark(self, name: str, value: str | None) -> None:
        """Keep a small note; None removes it."""
        check_mark(name, value)
        key = mark_key(name)

        def work(txn: Transaction) -> None:
            if value is None:
                txn.delete(key, db=self._tables.notes)
            else:
                txn.put(key, encode_mark(key, value), db=self._tables.notes)

        self._write(work)

    def clear(self) -> None:
        """Forget everything, in one transaction; other writers wait for its length."""

        def work(txn: Transaction) -> None:
            for table in self._tables:
                txn.drop(table, delete=False)

        self._write(work)

    @property
    def slot_number(self) -> int:
        """Which of the host's slots this process shares with its PID namespace."""
        return self._slot.number

    def map_bytes(self) -> int:
        """Return the size of the map: address space, an upper bound of the file."""
        self._check_open()
        return self._environment.map_bytes()

    def close(self) -> None:
        """Let go of the environment and the slot; idempotent."""
        if not self._closed:
            self._closed = True
            close_in(self._slot, self._environment, clock=self._clock)

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

    def _walk(
        self,
        batch: Callable[[Transaction, bytes], tuple[list[Row], bytes | None]],
        *,
        start: bytes,
    ) -> Iterator[Row]:
        rows, place = self._read(lambda txn: batch(txn, start))
        yield from rows
        while place is not None:
            at = place
            rows, place = self._read(lambda txn: batch(txn, at))  # noqa: B023 - it runs at once
            yield from rows

    def _pins(self) -> dict[RowKey, int]:
        """Return all pins that are set now; some may change between two batches."""
        last = self._read(lambda txn: last_place(txn, self._tables.pins))
        held: dict[RowKey, int] = {}
        place: bytes | None = b"\x00"
        while place is not None:
            found, place = self._read(
                partial(pinned_rows, tables=self._tables, start=place, last=last)
            )
            held.update(found)
        return held

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the index at {self._environment.path} was closed")


def touch(
    batch: Batch, prefix: bytes, keys: Sequence[Key], *, used_s: int, refresh_s: int | None
) -> list[Key]:
    """Raise the recency of the keys that have a row; return those to touch on disk."""
    batch.load([RowKey(prefix + key) for key in keys])
    due: list[Key] = []
    for key in keys:
        row_key = RowKey(prefix + key)
        old = batch.record(row_key)
        if old is None:
            continue
        touched_s = 0
        if refresh_s is not None and used_s - old.touched_s >= refresh_s:
            due.append(key)
            touched_s = used_s
        new = merge(old, Record(used_s=used_s, touched_s=touched_s, presumed=True))
        if new != old:
            batch.set(row_key, new)
    return due


def parts(items: Iterable[T]) -> Iterator[list[T]]:
    """Cut ``items`` into lists of at most ``BATCH_ROWS``."""
    remaining = iter(items)
    while part := list(islice(remaining, BATCH_ROWS)):
        yield part
