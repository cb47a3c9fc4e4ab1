"""The child of ``probe``: reads an environment to the end or to its death, and says "fit" or not.

Runs in its own process only, with nothing of the parent but its module path. It opens the file for
reading, copies all pages to nowhere (which walks every tree and the list of free pages in C, at the
speed of memory), then checks every value, and that the tables agree about their number of rows.
"""

import os
import resource
import sys
import time
from itertools import islice
from pathlib import Path

import lmdb

from prefixstore.index.environment import READERS_MAX, Tables
from prefixstore.index.notes import SUMS_TAG, decode_mark, decode_sums
from prefixstore.index.records import decode_count, decode_row

__all__ = ["main"]

CHUNK_ROWS = 4096
"""Rows checked between two looks at the clock."""


def main(path: str, within_s: float) -> None:
    """Probe ``path`` and print the verdict; any other end is a verdict, too."""
    # The expected deaths must not leave gigabytes of core files.
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
        verdict = "fit" if tables_pass(handle, deadline_s) else "damaged"
    sys.stdout.write(verdict)


def tables_pass(handle: lmdb.Environment, deadline_s: float) -> bool:
    """Check every value of every table, in one snapshot, until the deadline."""
    with handle.begin() as txn:
        tables = Tables(
            *(handle.open_db(name.encode(), txn=txn, create=False) for name in Tables._fields)
        )
        if txn.stat(tables.rows)["entries"] != txn.stat(tables.recency)["entries"]:
            return False
        checks = (
            (tables.notes, note_passes),
            (tables.waiting, lambda key, value: decode_count(key, value) is not None),
            (tables.pins, lambda key, value: decode_count(key, value) is not None),
            (tables.rows, lambda key, value: decode_row(key, value) is not None),
        )
        for table, passes in checks:
            pairs = iter(txn.cursor(table))
            while chunk := list(islice(pairs, CHUNK_ROWS)):
                if not all(passes(key, value) for key, value in chunk):
                    return False
                if time.monotonic() > deadline_s:
                    return True
    return True


def note_passes(key: bytes, value: bytes) -> bool:
    """Check a mark or the sums of a namespace."""
    decode = decode_sums if key.startswith(SUMS_TAG) else decode_mark
    return decode(key, value) is not None
