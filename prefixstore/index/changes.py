"""What each mutation of the index does to the rows of one batch, once the transaction is open."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from prefixstore.index.batch import Batch
from prefixstore.index.records import Record, RowKey, merge
from prefixstore.keys import Key

__all__ = ["BATCH_ROWS", "learn", "parts", "remove", "touch"]

BATCH_ROWS = 4096
"""Rows written in one transaction: fewer cost more commits, more keep other writers waiting."""

T = TypeVar("T")


def parts(items: Iterable[T]) -> Iterator[list[T]]:
    """Cut ``items`` into lists of at most ``BATCH_ROWS``."""
    remaining = iter(items)
    while part := list(islice(remaining, BATCH_ROWS)):
        yield part


def learn(batch: Batch, rows: Sequence[tuple[RowKey, Record]]) -> None:
    """Merge each record into what is known of its key."""
    batch.load(row_key for row_key, _ in rows)
    for row_key, record in rows:
        old = batch.record(row_key)
        if record == old:
            continue
        new = merge(old, record) if old else record
        if new != old:
            batch.set(row_key, new)


def remove(batch: Batch, row_keys: Sequence[RowKey]) -> int:
    """Drop the rows of those keys that have one; return how many."""
    batch.load(row_keys)
    known = [row_key for row_key in dict.fromkeys(row_keys) if batch.record(row_key) is not None]
    for row_key in known:
        batch.set(row_key, None)
    return len(known)


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
