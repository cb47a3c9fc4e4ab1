"""Reading and writing single tables inside a transaction; every value read passes its check.

A key at a time lets go of the interpreter lock once; a cursor's ``getmulti`` does so three times.
"""

from prefixstore.index.base import Totals
from prefixstore.index.environment import DamageError, Table, Transaction
from prefixstore.index.notes import (
    SUMS_TAG,
    decode_mark,
    decode_sums,
    encode_mark,
    mark_key,
    sums_namespace,
)
from prefixstore.index.records import (
    Record,
    RowKey,
    decode_count,
    decode_row,
    encode_count,
    recency_key,
)
from prefixstore.keys import NamespaceId

__all__ = [
    "all_sums",
    "count_of",
    "counts_of",
    "mark_of",
    "place_of",
    "rows_of",
    "sums_of",
    "write_counts",
    "write_mark",
]


def place_of(row_key: RowKey, record: Record) -> bytes:
    """Return where a row stands in the recency table."""
    return recency_key(row_key, used_s=record.used_s, end_token=record.end_token)


def rows_of(
    txn: Transaction, table: Table, row_keys: list[RowKey]
) -> dict[RowKey, tuple[Record, int]]:
    """Return the record and children of each key that has a row.

    Raises:
        DamageError: A row fails its check.
    """
    found: dict[RowKey, tuple[Record, int]] = {}
    get = txn.get
    for row_key in row_keys:
        value = get(row_key, None, table)
        if value is not None:
            decoded = decode_row(row_key, value)
            if decoded is None:
                raise DamageError(f"row {row_key.hex()} fails its check")
            found[row_key] = decoded
    return found


def counts_of(txn: Transaction, table: Table, row_keys: list[RowKey]) -> dict[RowKey, int]:
    """Return the counters of each key that has one.

    Raises:
        DamageError: A counter fails its check.
    """
    if not txn.stat(table)["entries"]:
        # Most of the time nothing waits and nothing is pinned.
        return {}
    found: dict[RowKey, int] = {}
    for row_key in row_keys:
        value = txn.get(row_key, None, table)
        if value is not None:
            count = decode_count(row_key, value)
            if count is None:
                raise DamageError(f"counter {row_key.hex()} fails its check")
            found[row_key] = count
    return found


def count_of(txn: Transaction, table: Table, row_key: RowKey) -> int:
    """Return the counter of one key, 0 if it has none."""
    return counts_of(txn, table, [row_key]).get(row_key, 0)


def sums_of(txn: Transaction, table: Table, key: bytes) -> Totals:
    """Return the sums of one namespace, zeros if it has none.

    Raises:
        DamageError: They fail their check.
    """
    value = txn.get(key, db=table)
    if value is None:
        return Totals(0, 0, 0)
    totals = decode_sums(key, value)
    if totals is None:
        raise DamageError(f"the sums {key.hex()} fail their check")
    return totals


def all_sums(txn: Transaction, table: Table) -> dict[NamespaceId, Totals]:
    """Return the sums of every namespace that has rows.

    Raises:
        DamageError: Sums fail their check.
    """
    cursor = txn.cursor(table)
    sums: dict[NamespaceId, Totals] = {}
    if cursor.set_range(SUMS_TAG):
        for key in cursor.iternext(keys=True, values=False):
            if not key.startswith(SUMS_TAG):
                break
            sums[sums_namespace(key)] = sums_of(txn, table, key)
    return sums


def write_counts(txn: Transaction, table: Table, counts: list[tuple[RowKey, int]]) -> None:
    """Set counters; those that are 0 go."""
    for row_key, count in counts:
        if count:
            txn.put(row_key, encode_count(row_key, count), db=table)
        else:
            txn.delete(row_key, db=table)


def mark_of(txn: Transaction, table: Table, name: str) -> str | None:
    """Return a mark's text, or None if it is not set.

    Raises:
        DamageError: It fails its check.
    """
    key = mark_key(name)
    value = txn.get(key, db=table)
    if value is None:
        return None
    text = decode_mark(key, value)
    if text is None:
        raise DamageError(f"the mark {name!r} fails its check")
    return text


def write_mark(txn: Transaction, table: Table, name: str, text: str | None) -> None:
    """Set a mark, or remove it."""
    key = mark_key(name)
    if text is None:
        txn.delete(key, db=table)
    else:
        txn.put(key, encode_mark(key, text), db=table)
