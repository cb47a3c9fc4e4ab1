"""Reading whole tables, one bounded batch to a transaction; the place is kept between them.

A walk goes forward only and ends at the last place that the table had when the walk began, so rows
that are touched or added meanwhile cannot keep it going.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol, TypeVar

from prefixstore.index.base import Refs, Row
from prefixstore.index.environment import DamageError, Table, Tables, Transaction
from prefixstore.index.records import RowKey, recency_row_key, split_row_key
from prefixstore.index.tables import counts_of, place_of, rows_of
from prefixstore.keys import KEY_BYTES_MAX

__all__ = ["Walk", "rows_with_refs"]

WALK_ROWS = 1024
"""Places visited in one transaction: a longer one would pin pages and hold up a map's growth."""

T = TypeVar("T")


class Reader(Protocol):
    """Runs work in a read transaction of its own; see ``environment.Environment.read``."""

    def __call__(self, work: Callable[[Transaction], T], /) -> T:
        """Return what ``work`` returns."""
        ...


class Walk:
    """Walks over the tables of one index; as safe for concurrent use as its reader."""

    def __init__(self, read: Reader, tables: Tables) -> None:
        self._read = read
        self._tables = tables

    def by_age(self, prefix: bytes) -> Iterator[Row]:
        """Walk in the order of eviction; rows outside ``prefix`` are visited and left out."""

        def batch(txn: Transaction, places: list[bytes]) -> list[Row]:
            wanted = [place for place in places if recency_row_key(place).startswith(prefix)]
            row_keys = [RowKey(recency_row_key(place)) for place in wanted]
            rows = rows_with_refs(txn, self._tables, row_keys)
            if wanted != [
                place_of(row_key, row.record) for row_key, row in zip(row_keys, rows, strict=False)
            ]:
                raise DamageError(f"recency and rows differ after {places[0].hex()}")
            return rows

        last = self._last_of(self._tables.recency)
        return self._rows(self._tables.recency, batch, start=b"\x00", last=last)

    def by_key(self, prefix: bytes) -> Iterator[Row]:
        """Walk in the order of namespace and key; ``prefix`` is a namespace, or empty for all."""

        def batch(txn: Transaction, keys: list[bytes]) -> list[Row]:
            return rows_with_refs(txn, self._tables, [RowKey(key) for key in keys])

        last = self._last_of(self._tables.rows)
        if prefix:
            last = min(last, prefix + b"\xff" * (KEY_BYTES_MAX + 1))
        return self._rows(self._tables.rows, batch, start=prefix or b"\x00", last=last)

    def pins(self) -> dict[RowKey, int]:
        """Return all pins; some may change between two batches."""

        def batch(txn: Transaction, keys: list[bytes]) -> list[tuple[RowKey, int]]:
            return list(counts_of(txn, self._tables.pins, [RowKey(key) for key in keys]).items())

        last = self._last_of(self._tables.pins)
        return dict(self._rows(self._tables.pins, batch, start=b"\x00", last=last))

    def _last_of(self, table: Table) -> bytes:
        return self._read(lambda txn: last_key(txn, table))

    def _rows(
        self,
        table: Table,
        batch: Callable[[Transaction, list[bytes]], list[T]],
        *,
        start: bytes,
        last: bytes,
    ) -> Iterator[T]:
        """Yield what ``batch`` makes of each batch of keys from ``start`` to ``last``."""
        place = start
        while True:

            def work(txn: Transaction, start: bytes = place) -> tuple[list[T], bytes]:
                keys = keys_from(txn, table, start=start, last=last)
                return (batch(txn, keys), keys[-1] + b"\x00") if keys else ([], b"")

            found, place = self._read(work)
            yield from found
            if not place:
                return


def rows_with_refs(txn: Transaction, tables: Tables, row_keys: list[RowKey]) -> list[Row]:
    """Return the rows of those keys that have one, in the order of ``row_keys``."""
    found = rows_of(txn, tables.rows, row_keys)
    pins = counts_of(txn, tables.pins, row_keys)
    return [
        Row(
            *split_row_key(row_key),
            found[row_key][0],
            Refs(found[row_key][1], pins.get(row_key, 0)),
        )
        for row_key in row_keys
        if row_key in found
    ]


def last_key(txn: Transaction, table: Table) -> bytes:
    """Return the last key of a table, b"" if it is empty."""
    cursor = txn.cursor(table)
    return cursor.key() if cursor.last() else b""


def keys_from(txn: Transaction, table: Table, *, start: bytes, last: bytes) -> list[bytes]:
    """Return up to ``WALK_ROWS`` keys from ``start`` to ``last``, both included."""
    cursor = txn.cursor(table)
    if not cursor.set_range(start):
        return []
    keys = list(islice(cursor.iternext(keys=True, values=False), WALK_ROWS))
    return [key for key in keys if key <= last]
