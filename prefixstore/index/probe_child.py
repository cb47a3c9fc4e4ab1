"""The child of ``probe``: reads an environment to the end or to its death, and says "fit" or not.

Runs in a process of its own, with nothing of the parent but its module path. In one snapshot it

    1. copies all pages to nowhere, which walks every tree and the list of free pages in C;
    2. checks every value, and that the keys of each table ascend and are as many as it claims;
    3. checks that the tables agree, by sums of hashes that need no memory: each row stands once in
       the recency table, and children are as many as records that name their key as parent.

The deadline may cut 2 short and then leaves out 3.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import lmdb
import xxhash

from prefixstore.index.environment import READERS_MAX, Table, Tables, Transaction
from prefixstore.index.notes import SUMS_TAG, decode_mark, decode_sums
from prefixstore.index.records import NAMESPACE_BYTES, RowKey, decode_count, decode_row
from prefixstore.index.tables import place_of

__all__ = ["main"]

CHUNK_ROWS = 4096
"""Rows checked between two looks at the clock."""
MODULUS = 2**64


class DamageFoundError(Exception):
    """The environment contradicts itself."""


class OutOfTimeError(Exception):
    """The deadline has come; what was read so far is fit."""


def main(path: str, within_s: float) -> None:
    """Probe ``path`` and print the verdict; any other end is a verdict, too."""
    # The expected deaths must not leave core files of the map's size.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    deadline_s = time.monotonic() + within_s
    with lmdb.open(
        path,
        readonly=True,
        create=False,
        max_dbs=len(Tables._fields),
        max_readers=READERS_MAX,
        max_spare_txns=0,
    ) as handle:
        with Path(os.devnull).open("wb") as nowhere:
            handle.copyfd(nowhere.fileno(), compact=True)
        try:
            check_tables(handle, deadline_s)
            verdict = "fit"
        except OutOfTimeError:
            verdict = "fit"
        except DamageFoundError:
            verdict = "damaged"
    sys.stdout.write(verdict)


def check_tables(handle: lmdb.Environment, deadline_s: float) -> None:
    """Check every table and their agreement."""
    with handle.begin() as txn:
        tables = Tables(
            *(handle.open_db(name.encode(), txn=txn, create=False) for name in Tables._fields)
        )
        sums = Sums()
        checks: tuple[tuple[Table, Callable[[bytes, bytes], object]], ...] = (
            (tables.notes, check_note),
            (tables.pins, check_count),
            (tables.waiting, sums.add_waiting),
            (tables.rows, sums.add_row),
            (tables.recency, sums.add_place),
        )
        for table, check in checks:
            for key, value in ascending(txn, table, deadline_s):
                check(key, value)
        require(not sums.places)
        require(not sums.children)


class Sums:
    """Sums of hashes that come to zero where two tables hold the same facts."""

    def __init__(self) -> None:
        self.places = 0
        self.children = 0

    def add_row(self, key: bytes, value: bytes) -> None:
        """Count a row: its children, itself as its parent's child, and the place it should have."""
        decoded = decode_row(key, value)
        require(decoded is not None)
        assert decoded is not None, "require raises"
        record, children = decoded
        self._add_children(key, children)
        if record.parent is not None:
            self._add_children(key[:NAMESPACE_BYTES] + record.parent, -1)
        place = place_of(RowKey(key), record)
        self.places = (self.places + xxhash.xxh3_64_intdigest(place)) % MODULUS

    def add_waiting(self, key: bytes, value: bytes) -> None:
        """Count the children of a key without a row."""
        self._add_children(key, check_count(key, value))

    def add_place(self, key: bytes, value: bytes) -> None:
        """Count a place in the recency table off those that rows should have."""
        require(not value)
        self.places = (self.places - xxhash.xxh3_64_intdigest(key)) % MODULUS

    def _add_children(self, key: bytes, children: int) -> None:
        self.children = (self.children + children * xxhash.xxh3_64_intdigest(key)) % MODULUS


def ascending(txn: Transaction, table: Table, deadline_s: float) -> Iterator[tuple[bytes, bytes]]:
    """Yield all pairs of a table, which must come in order and in the number that it claims."""
    pairs = iter(txn.cursor(table))
    last, seen = b"", 0
    while chunk := list(islice(pairs, CHUNK_ROWS)):
        if time.monotonic() > deadline_s:
            raise OutOfTimeError
        for key, value in chunk:
            require(last < key)
            last = key
            yield key, value
        seen += len(chunk)
    require(seen == txn.stat(table)["entries"])


def check_count(key: bytes, value: bytes) -> int:
    """Return a bare counter that passes its check."""
    count = decode_count(key, value)
    require(count is not None)
    assert count is not None, "require raises"
    return count


def check_note(key: bytes, value: bytes) -> None:
    """Check a mark or the sums of a namespace."""
    decode = decode_sums if key.startswith(SUMS_TAG) else decode_mark
    require(decode(key, value) is not None)


def require(passed: bool) -> None:  # noqa: FBT001 - reads like assert
    """Raise unless ``passed``; an assert could be switched off."""
    if not passed:
        raise DamageFoundError
