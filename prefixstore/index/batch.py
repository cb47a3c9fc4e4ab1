"""The rows that one write transaction reads and changes, gathered first and written at once.

Owns how refcounts, recency and sums follow from rows: callers say which record a key has now, and
``flush`` moves the children of its parents, its place in the recency table and the sums of its
namespace along. All of it stands or falls with the caller's transaction.

A batch reads each row once and writes each table in one run.
"""

from collections import Counter
from collections.abc import Iterable

from prefixstore.index.base import Totals
from prefixstore.index.environment import DamageError, Table, Tables, Transaction
from prefixstore.index.notes import encode_sums, sums_key
from prefixstore.index.records import (
    NAMESPACE_BYTES,
    Record,
    RowKey,
    encode_count,
    encode_row,
)
from prefixstore.index.tables import counts_of, place_of, rows_of, sums_of

__all__ = ["Batch"]


class Batch:
    """Changes to rows inside one write transaction; used by one thread, then dropped."""

    def __init__(self, txn: Transaction, tables: Tables) -> None:
        self._txn = txn
        self._tables = tables
        self._before: dict[RowKey, tuple[Record, int] | None] = {}
        self._after: dict[RowKey, Record | None] = {}
        self._steps: Counter[RowKey] = Counter()

    def load(self, row_keys: Iterable[RowKey]) -> None:
        """Read the rows of ``row_keys``; each key must be loaded before it is used."""
        missing = [row_key for row_key in row_keys if row_key not in self._before]
        found = rows_of(self._txn, self._tables.rows, missing)
        for row_key in missing:
            self._before[row_key] = found.get(row_key)

    def record(self, row_key: RowKey) -> Record | None:
        """Return the record that ``row_key`` has now, changes of this batch included."""
        if row_key in self._after:
            return self._after[row_key]
        before = self._before[row_key]
        return before[0] if before else None

    def set(self, row_key: RowKey, record: Record | None) -> None:
        """Give ``row_key`` another record, or none."""
        old = self.record(row_key)
        self._after[row_key] = record
        old_parent = old.parent if old else None
        new_parent = record.parent if record else None
        if old_parent == new_parent:
            return
        prefix = row_key[:NAMESPACE_BYTES]
        if old_parent is not None:
            self._steps[RowKey(prefix + old_parent)] -= 1
        if new_parent is not None:
            self._steps[RowKey(prefix + new_parent)] += 1

    def flush(self) -> None:
        """Write every change into the transaction.

        Raises:
            DamageError: A stored count or sum contradicts the rows.
            InvalidError: A record holds a number that a row cannot.
        """
        self.load(self._steps)
        changed = list(dict.fromkeys([*self._after, *self._steps]))
        waiting = counts_of(
            self._txn,
            self._tables.waiting,
            [row_key for row_key in changed if self._before[row_key] is None],
        )
        rows: list[tuple[bytes, bytes]] = []
        rows_gone: list[bytes] = []
        waits: list[tuple[bytes, bytes]] = []
        waits_gone: list[bytes] = []
        for row_key in changed:
            before, after = self._before[row_key], self.record(row_key)
            children = (before[1] if before else waiting.get(row_key, 0)) + self._steps[row_key]
            if children < 0:
                raise DamageError(f"row {row_key.hex()} has {children} children")
            if after is not None:
                rows.append((row_key, encode_row(row_key, after, children=children)))
            elif children:
                waits.append((row_key, encode_count(row_key, children)))
            if before is not None and after is None:
                rows_gone.append(row_key)
            if row_key in waiting and (after is not None or not children):
                waits_gone.append(row_key)
        self._write(self._tables.rows, rows, rows_gone)
        self._write(self._tables.waiting, waits, waits_gone)
        self._move_recency()
        self._move_sums()

    def _move_recency(self) -> None:
        places: list[tuple[bytes, bytes]] = []
        places_gone: list[bytes] = []
        for row_key, after in self._after.items():
            before = self._before[row_key]
            old_place = place_of(row_key, before[0]) if before else None
            new_place = place_of(row_key, after) if after else None
            if old_place == new_place:
                continue
            if old_place is not None:
                places_gone.append(old_place)
            if new_place is not None:
                places.append((new_place, b""))
        self._write(self._tables.recency, places, places_gone)

    def _move_sums(self) -> None:
        moves: dict[bytes, list[int]] = {}
        for row_key, after in self._after.items():
            before = self._before[row_key]
            move = moves.setdefault(row_key[:NAMESPACE_BYTES], [0, 0, 0])
            for record, sign in ((before[0] if before else None, -1), (after, 1)):
                if record is not None:
                    move[0] += sign
                    move[1] += sign * record.file_bytes
                    move[2] += sign * record.presumed
        sums: list[tuple[bytes, bytes]] = []
        sums_gone: list[bytes] = []
        for prefix, move in moves.items():
            key = sums_key(prefix)
            old = sums_of(self._txn, self._tables.notes, key)
            new = Totals(*(was + by for was, by in zip(old, move, strict=True)))
            if min(new) < 0:
                raise DamageError(f"the sums of namespace {prefix.hex()} became {new}")
            if new.chunks:
                sums.append((key, encode_sums(key, new)))
            else:
                sums_gone.append(key)
        self._write(self._tables.notes, sums, sums_gone)

    def _write(
        self, table: Table, items: list[tuple[bytes, bytes]], keys_gone: list[bytes]
    ) -> None:
        delete = self._txn.delete
        for key in keys_gone:
            delete(key, db=table)
        if items:
            self._txn.cursor(table).putmulti(items)
