"""How fast a root is through the store itself: chunks stored, looked up and loaded by several threads.

Works in a root of its own, in a directory beside the chunks of the real one: names outside the layout are
never read, counted or evicted there. Stores are as durable as the settings say, loads are verified. Before the
cold loads the files leave this host's page cache; a server's cache keeps them, as it would keep them for a
replica.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median, quantiles

from prefixstore.blob.header import file_bytes
from prefixstore.clock import Clock, SystemClock
from prefixstore.config import StoreConfig
from prefixstore.errors import FullError, UnavailableError
from prefixstore.keys import Key, make_key
from prefixstore.store import Chunk, Loaded, PrefixStore
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.root import Root

__all__ = ["BenchReport", "Timing", "bench"]

PREFIX = ".prefixstore-bench-"
ROOM = 1.2
"""Free space wanted, as a multiple of what is stored: a full disk is no place to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One kind of operation.

    Attributes:
        operation: What was done.
        count: How often.
        bytes_per_s: Payload moved in a second by all threads together; 0 where none moves.
        median_s: Half of them took no longer.
        p99_s: One in a hundred took longer.
    """

    operation: str
    count: int
    bytes_per_s: float
    median_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What was measured.

    Attributes:
        root: Where.
        chunk_bytes: The payload of each chunk.
        chunks: How many.
        threads: That worked at once.
        timings: In the order of the work.
    """

    root: str
    chunk_bytes: int
    chunks: int
    threads: int
    timings: tuple[Timing, ...]


def bench(
    root: Root,
    *,
    chunk_bytes: int,
    chunks: int,
    threads: int,
    config: StoreConfig | None = None,
    clock: Clock | None = None,
) -> BenchReport:
    """Measure a root and leave nothing behind.

    Args:
        root: The root; nothing in it changes.
        chunk_bytes: Payload of each chunk.
        chunks: How many are stored, as one chain.
        threads: Calls in flight.
        config: Settings of the store that is measured.
        clock: The clock.

    Raises:
        FullError: There is no room for it.
        UnavailableError: The root cannot be written, or a chunk did not come back.
    """
    clock = clock or SystemClock()
    wanted_bytes = int(ROOM * chunks * file_bytes(chunk_bytes))
    free_bytes = root.os_calls.space(root.path).free_bytes
    if free_bytes < wanted_bytes:
        raise FullError(
            f"{root.path} has {free_bytes} bytes free, {wanted_bytes} are wanted to measure: take fewer "
            "or smaller chunks"
        )
    directory = f"{root.path}/{PREFIX}{uuid.uuid4().hex}"
    try:
        with PrefixStore.open(
            directory, namespace={"bench": True}, config=config, index=None, os_calls=root.os_calls
        ) as store:
            timings = _measure(store, chunk_bytes, chunks, threads=threads, clock=clock)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return BenchReport(
        root=root.path, chunk_bytes=chunk_bytes, chunks=chunks, threads=threads, timings=timings
    )


def _measure(
    store: PrefixStore, chunk_bytes: int, chunks: int, *, threads: int, clock: Clock
) -> tuple[Timing, ...]:
    keys = [make_key(hashlib.sha256(f"bench/{at}".encode()).digest()) for at in range(chunks)]
    # Bytes that no filesystem compresses.
    payload = memoryview(hashlib.shake_128(b"prefixstore").digest(chunk_bytes))
    buffers = [Buffer.allocate(chunk_bytes) for _ in range(threads)]

    def put(at: int, buffer: Buffer) -> None:
        buffer.payload(chunk_bytes)[:] = payload
        parent = keys[at - 1] if at else None
        chunk = Chunk(key=keys[at], parent=parent, end_token=at + 1)
        outcome = store.store(chunk, buffer, raw_bytes=chunk_bytes)
        if not outcome.published:
            raise UnavailableError(f"a chunk was not stored: {outcome.reason}: {outcome.detail}")

    def get(at: int, buffer: Buffer) -> None:
        found = store.load(keys[at], buffer, raw_bytes=chunk_bytes)
        if not isinstance(found, Loaded):
            raise UnavailableError(f"a chunk was not loaded: {found.reason}: {found.detail}")

    def look(_: int, __: Buffer) -> None:
        store.longest_prefix(keys)

    def timed(operation: str, do: Callable[[int, Buffer], None], count: int, moved: int) -> Timing:
        return _timed(operation, do, count, moved_bytes=moved, buffers=buffers, clock=clock)

    stored = timed("store", put, chunks, chunk_bytes)
    _leave_page_cache(store, keys)
    cold = timed("load, cold", get, chunks, chunk_bytes)
    warm = timed("load again", get, chunks, chunk_bytes)
    looked = timed("look up the chain", look, min(chunks, 100), 0)
    return stored, cold, warm, looked


def _timed(
    operation: str,
    do: Callable[[int, Buffer], None],
    count: int,
    *,
    moved_bytes: int,
    buffers: Sequence[Buffer],
    clock: Clock,
) -> Timing:
    """Share ``count`` calls among threads, one buffer each."""
    numbers = iter(range(count))

    def work(buffer: Buffer) -> list[float]:
        took_s = []
        for at in numbers:
            started_s = clock.monotonic_s()
            do(at, buffer)
            took_s.append(clock.monotonic_s() - started_s)
        return took_s

    started_s = clock.monotonic_s()
    with ThreadPoolExecutor(len(buffers)) as pool:
        spans_s = [span for spans in pool.map(work, buffers) for span in spans]
    elapsed_s = max(clock.monotonic_s() - started_s, 1e-9)
    return Timing(
        operation=operation,
        count=count,
        bytes_per_s=count * moved_bytes / elapsed_s,
        median_s=median(spans_s),
        p99_s=quantiles(spans_s, n=100)[98] if len(spans_s) > 1 else spans_s[0],
    )


def _leave_page_cache(store: PrefixStore, keys: Sequence[Key]) -> None:
    """Have this host forget the files' bytes; what refuses is measured warm."""
    assert store.namespace is not None, "opened with one"
    calls = store.root.os_calls
    for key in keys:
        try:
            fd = calls.open(store.root.layout.blob(store.namespace, key), os.O_RDONLY)
        except OSError:
            continue
        try:
            calls.sync_data(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            continue
        finally:
            calls.close(fd)
