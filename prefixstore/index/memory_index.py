"""An index in a dict: the reference model of the contract, and the fallback where LMDB cannot be.

Owns nothing outside this process and starts empty each time. It is bounded: beyond ``rows_max`` it
forgets the rows that eviction would take last, which costs a probe of the tree when they are asked
for again. With a row goes all that it follows, and stays away: it may look older, since times on disk are
sampled, and would look as if nothing followed it. So what an eviction finds here is what has to go first,
leaves before what they follow, however much the root holds. Plain code on purpose; ``LmdbIndex`` is checked
against it step by step.
"""

import heapq
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prefixstore.errors import ClosedError
from prefixstore.index.base import Address, Entry, Refs, Row, Totals
from prefixstore.index.followed import Followed
from prefixstore.index.limits import check_mark, gallop
from prefixstore.index.records import (
    NAMESPACE_BYTES,
    Record,
    RowKey,
    check_record,
    merge,
    namespace_prefix,
    recency_key,
    split_row_key,
)
from prefixstore.keys import Key, NamespaceId

__all__ = ["ROWS_MAX", "MemoryIndex"]

ROWS_MAX = 2**18
"""Some 100 MB. Eviction sorts them all and holds everyone up for half a second meanwhile; a host that
needs more rows needs LMDB. The chunks used last are then looked for on disk."""
FORGET_SHARE = 8
"""One row in eight is forgotten at once, so that the sort is paid once in many puts."""
BATCH_ROWS = 1024
"""Rows copied out under the lock between two yields of an iterator."""


class MemoryIndex:
    """A bounded ``Index`` in this process's memory.

    Safe for concurrent use: one lock around every method, never held while a caller runs.
    """

    def __init__(self, *, rows_max: int = ROWS_MAX) -> None:
        self.rows_max = rows_max
        self.has_forgotten = False
        self._lock = threading.Lock()
        self._rows: dict[RowKey, Record] = {}
        self._children: Counter[RowKey] = Counter()
        self._pins: dict[RowKey, int] = {}
        self._marks: dict[str, str] = {}
        self._followed: Followed | None = None
        self._closed = False

    def get_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> list[Record | None]:
        """Return what is known of each key, in order."""
        prefix = namespace_prefix(namespace)
        with self._lock:
            self._check_open()
            return [self._rows.get(RowKey(prefix + key)) for key in keys]

    def known_prefix(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Return how many leading keys of a chain are known, by galloping."""
        prefix = namespace_prefix(namespace)
        with self._lock:
            self._check_open()
            return gallop(len(keys), lambda at: RowKey(prefix + keys[at]) in self._rows)

    def row(self, namespace: NamespaceId, key: Key) -> Row | None:
        """Return the row of ``key`` with its refcounts, or None."""
        row_key = RowKey(namespace_prefix(namespace) + key)
        with self._lock:
            self._check_open()
            return self._row(row_key) if row_key in self._rows else None

    def refs(self, namespace: NamespaceId, key: Key) -> Refs:
        """Return the refcounts of ``key``, whether or not it has a row."""
        row_key = RowKey(namespace_prefix(namespace) + key)
        with self._lock:
            self._check_open()
            return self._refs(row_key)

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Learn chunks; what is known of them already stays known."""
        batch = [(RowKey(namespace_prefix(ns) + key), record) for ns, key, record in entries]
        for _, record in batch:
            check_record(record)
        with self._lock:
            self._check_open()
            for row_key, record in batch:
                old = self._rows.get(row_key)
                self._set(row_key, merge(old, record) if old else record)
            if self._followed is not None:
                self._drop([row_key for row_key, _ in batch if row_key in self._followed])
            if len(self._rows) > self.rows_max:
                self._forget()

    def remove_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Forget chunks and return how many had a row."""
        prefix = namespace_prefix(namespace)
        with self._lock:
            self._check_open()
            before = len(self._rows)
            for key in keys:
                self._set(RowKey(prefix + key), None)
            return before - len(self._rows)

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
        due: list[Key] = []
        with self._lock:
            self._check_open()
            for key in keys:
                row_key = RowKey(prefix + key)
                old = self._rows.get(row_key)
                if old is None:
                    continue
                touched_s = 0
                if refresh_s is not None and used_s - old.touched_s >= refresh_s:
                    due.append(key)
                    touched_s = used_s
                self._rows[row_key] = merge(
                    old, Record(used_s=used_s, touched_s=touched_s, presumed=True)
                )
        return due

    def set_pins(self, pins: Mapping[Address, int]) -> None:
        """Make the pins equal to ``pins``."""
        held = {RowKey(namespace_prefix(ns) + key): n for (ns, key), n in pins.items() if n > 0}
        with self._lock:
            self._check_open()
            self._pins = held

    def oldest_first(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by recency, oldest first, deepest first within a second."""
        with self._lock:
            self._check_open()
            order = sorted(self._selected(namespace), key=self._recency)
        return self._in_batches(order)

    def scan(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows in the order of namespace and key."""
        with self._lock:
            self._check_open()
            order = sorted(self._selected(namespace))
        return self._in_batches(order)

    def totals(self) -> dict[NamespaceId, Totals]:
        """Return sums for each namespace that has rows."""
        sums: dict[NamespaceId, Totals] = {}
        with self._lock:
            self._check_open()
            for row_key, record in self._rows.items():
                namespace, _ = split_row_key(row_key)
                chunks, file_bytes, presumed = sums.get(namespace, Totals(0, 0, 0))
                sums[namespace] = Totals(
                    chunks + 1, file_bytes + record.file_bytes, presumed + record.presumed
                )
        return sums

    def mark(self, name: str) -> str | None:
        """Return a note set by ``set_mark``, or None."""
        check_mark(name, None)
        with self._lock:
            self._check_open()
            return self._marks.get(name)

    def set_mark(self, name: str, value: str | None) -> None:
        """Keep a small note; None removes it."""
        check_mark(name, value)
        with self._lock:
            self._check_open()
            if value is None:
                self._marks.pop(name, None)
            else:
                self._marks[name] = value

    def renew(self) -> None:
        """Expect to be told of all chunks anew."""
        with self._lock:
            self._check_open()
            self.has_forgotten, self._followed = False, None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._check_open()
            self._drop_all()

    def close(self) -> None:
        """Let go of the memory; idempotent."""
        with self._lock:
            self._closed = True
            self._drop_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this index was closed")

    def _drop_all(self) -> None:
        self._rows.clear()
        self.has_forgotten, self._followed = False, None
        self._children.clear()
        self._pins.clear()
        self._marks.clear()

    def _refs(self, row_key: RowKey) -> Refs:
        return Refs(self._children[row_key], self._pins.get(row_key, 0))

    def _row(self, row_key: RowKey) -> Row:
        namespace, key = split_row_key(row_key)
        return Row(namespace, key, self._rows[row_key], self._refs(row_key))

    def _recency(self, row_key: RowKey) -> bytes:
        record = self._rows[row_key]
        return recency_key(row_key, used_s=record.used_s, end_token=record.end_token)

    def _selected(self, namespace: NamespaceId | None) -> list[RowKey]:
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        return [row_key for row_key in self._rows if row_key.startswith(prefix)]

    def _in_batches(self, order: list[RowKey]) -> Iterator[Row]:
        for start in range(0, len(order), BATCH_ROWS):
            with self._lock:
                self._check_open()
                batch = [
                    self._row(row_key)
                    for row_key in order[start : start + BATCH_ROWS]
                    if row_key in self._rows
                ]
            yield from batch

    def _set(self, row_key: RowKey, record: Record | None) -> None:
        """Write or drop one row and move its parent's count along."""
        old = self._rows.pop(row_key, None)
        if record is not None:
            self._rows[row_key] = record
        prefix = row_key[: -len(split_row_key(row_key)[1])]
        for holder, step in ((old, -1), (record, 1)):
            if holder is not None and holder.parent is not None:
                parent = RowKey(prefix + holder.parent)
                self._children[parent] += step
                if not self._children[parent]:
                    del self._children[parent]

    def _forget(self) -> None:
        """Drop rows, youngest and nearest to the start first, until an eighth of the room is free."""
        self.has_forgotten = True
        surplus = len(self._rows) - self.rows_max + self.rows_max // FORGET_SHARE
        self._drop(heapq.nlargest(surplus, self._rows, key=self._recency))

    def _drop(self, row_keys: list[RowKey]) -> None:
        """Drop rows with all that they follow: the children of each row that stays have rows, too."""
        if self._followed is None:
            self._followed = Followed()
        queue = row_keys
        while queue:
            row_key = queue.pop()
            record = self._rows.get(row_key)
            if record is None:
                continue
            self._set(row_key, None)
            if record.parent is not None:
                parent = RowKey(row_key[:NAMESPACE_BYTES] + record.parent)
                self._followed.add(parent)
                queue.append(parent)
