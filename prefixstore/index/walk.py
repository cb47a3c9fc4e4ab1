"""Reading whole tables, one bounded batch to a transaction; the caller keeps the place between them.

A walk goes forward only and ends at the last place that the table had when the walk began, so rows
that are touched or added meanwhile cannot keep it going.
"""

from itertools import islice

from prefixstore.index.base import Refs, Row
from prefixstore.index.batch import counts_of, place_of, rows_of
from prefixstore.index.environment import DamageError, Table, Tables, Transaction
from prefixstore.index.records import RowKey, recency_row_key, split_row_key

__all__ = ["WALK_ROWS", "last_place", "pinned_rows", "rows_by_age", "rows_by_key", "rows_with_refs"]

WALK_ROWS = 1024
"""Places visited in one transaction: a longer one would pin pages and hold up a map's growth."""


def last_place(txn: Transaction, table: Table) -> bytes:
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


def rows_by_age(
    txn: Transaction, tables: Tables, *, prefix: bytes, start: bytes, last: bytes
) -> tuple[list[Row], bytes | None]:
    """Return one batch of rows in the order of eviction, and where the next one starts.

    Args:
        txn: The batch's transaction.
        tables: Where to read.
        prefix: Rows of other namespaces are visited and left out; b"" for all.
        start: The first place to visit.
        last: The last place to visit.

    Raises:
        DamageError: A place stands for no row, or for a row that stands elsewhere.
    """
    places = keys_from(txn, tables.recency, start=start, last=last)
    if not places:
        return [], None
    wanted = [place for place in places if recency_row_key(place).startswith(prefix)]
    rows = rows_with_refs(txn, tables, [RowKey(recency_row_key(place)) for place in wanted])
    if wanted != [
        place_of(RowKey(recency_row_key(place)), row.record)
        for place, row in zip(wanted, rows, strict=False)
    ]:
        raise DamageError(f"recency and rows differ after {places[0].hex()}")
    return rows, places[-1] + b"\x00"


def rows_by_key(
    txn: Transaction, tables: Tables, *, start: bytes, last: bytes
) -> tuple[list[Row], bytes | None]:
    """Return one batch of rows in the order of their keys, and where the next one starts."""
    keys = keys_from(txn, tables.rows, start=start, last=last)
    if not keys:
        return [], None
    return rows_with_refs(txn, tables, [RowKey(key) for key in keys]), keys[-1] + b"\x00"


def pinned_rows(
    txn: Transaction, tables: Tables, *, start: bytes, last: bytes
) -> tuple[dict[RowKey, int], bytes | None]:
    """Return one batch of pinned keys with their counts, and where the next one starts."""
    keys = keys_from(txn, tables.pins, start=start, last=last)
    if not keys:
        return {}, None
    return counts_of(txn, tables.pins, [RowKey(key) for key in keys]), keys[-1] + b"\x00"
