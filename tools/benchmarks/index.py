"""What the index costs: each call over a chain of 4096 chunks, alone and beside a busy thread.

The lmdb module lets go of the interpreter lock around each get and put, so a Python thread that
computes makes bulk calls wait for their turn at every key; the second column shows how much.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixstore.index.base import Entry, Index
from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.index.probe import probe
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId

CHAIN = 4096
NAMESPACE = NamespaceId("ab" * 16)
KEY_BYTES = 36


def new_chain(used_s: int) -> list[Entry]:
    """Return a chain of chunks that no index knows yet."""
    keys = [Key(os.urandom(KEY_BYTES)) for _ in range(CHAIN)]
    return [
        (
            NAMESPACE,
            key,
            Record(
                file_bytes=2**20,
                raw_bytes=2**20,
                end_token=16 * (at + 1),
                parent=keys[at - 1] if at else None,
                used_s=used_s,
            ),
        )
        for at, key in enumerate(keys)
    ]


@contextmanager
def busy_thread(busy: bool) -> Iterator[None]:  # noqa: FBT001 - a column of the table
    """Compute in another thread meanwhile, if ``busy``."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=compute)
    if busy:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if busy:
            thread.join()


def median_ms(call: Callable[[], object], *, times: int) -> float:
    """Return the median duration of ``call``."""
    taken_s = []
    for _ in range(times):
        started_s = time.perf_counter()
        call()
        taken_s.append(time.perf_counter() - started_s)
    return 1e3 * statistics.median(taken_s)


def calls_of(index: Index, known: list[Entry]) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    keys = [key for _, key, _ in known]
    fresh = iter([new_chain(2000) for _ in range(40)])
    clock = iter(range(10_000, 11_000))
    return {
        "known_prefix": lambda: index.known_prefix(NAMESPACE, keys),
        "get_many": lambda: index.get_many(NAMESPACE, keys),
        "put_many, new": lambda: index.put_many(next(fresh)),
        "put_many, known": lambda: index.put_many(known),
        "touch_many": lambda: index.touch_many(NAMESPACE, keys, used_s=next(clock)),
    }


def report(index: Index, *, chains: int, times: int, with_busy: bool) -> None:
    """Fill the index and print the table."""
    name = type(index).__name__
    known = new_chain(1000)
    index.put_many(known)
    for at in range(chains - 1):
        index.put_many(new_chain(at))
    print(f"{name}, {chains * CHAIN} rows, {CHAIN} keys a call, ms:   alone   busy thread")
    for call_name, call in calls_of(index, known).items():
        alone_ms = median_ms(call, times=times)
        beside = ""
        if with_busy:
            with busy_thread(busy=True):
                beside = f"{median_ms(call, times=3):10.1f}"
        print(f"  {call_name:18} {alone_ms:8.2f} {beside}")
    started_s = time.perf_counter()
    rows = sum(1 for _ in index.oldest_first())
    print(f"  oldest_first       {1e3 * (time.perf_counter() - started_s):8.0f}   ({rows} rows)")


def main() -> None:
    """Print the tables of both indexes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=25, help="rows before timing, in 4096")
    parser.add_argument("--times", type=int, default=9, help="repetitions of each call, up to 30")
    parser.add_argument("--no-busy", action="store_true", help="leave out the busy thread")
    parser.add_argument("--index-dir", help="a directory on a local filesystem")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.index_dir) as directory:
        with LmdbIndex.open(directory, store_id="bench") as index:
            report(
                index,
                chains=options.chains,
                times=options.times,
                with_busy=not options.no_busy,
            )
        (data,) = Path(directory).glob("bench/*/seat-0/*/data.mdb")
        rows = CHAIN * (options.chains + options.times + (0 if options.no_busy else 3))
        print(f"  {data.stat().st_size / rows:.0f} bytes of file a row")
        print(f"  probe in a child   {median_ms(lambda: probe(data.parent), times=3):8.0f}")
        started_s = time.perf_counter()
        with LmdbIndex.open(directory, store_id="bench"):
            print(f"  open after a close {1e3 * (time.perf_counter() - started_s):8.1f}")
    memory = MemoryIndex()
    report(memory, chains=options.chains, times=options.times, with_busy=False)
    memory.close()


if __name__ == "__main__":
    main()
