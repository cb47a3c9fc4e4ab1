"""How long a filesystem takes for what a store does: small calls, and bytes.

Small calls are repeated and told by their median and their slowest. Bytes are written and read once, in
pieces of a large chunk, past the page cache where that works; where it does not, reading measures memory
and is left out. All of it is bounded, by number and by time, since a slow filesystem is what one looks for.
"""

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from prefixstore.ops.checks import Scratch
from prefixstore.tree.osfs import write_whole

__all__ = ["Bandwidth", "Latency", "bandwidths", "latencies"]

CALLS_MAX = 100
BUDGET_S = 2.0
"""For each kind: at 100 ms a call that is twenty of them, enough for a median."""
PIECE_BYTES = 4 * 2**20
"""A chunk of a large model; smaller pieces measure calls, not bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """A small call, repeated.

    Attributes:
        operation: What was done.
        calls: How often.
        median_s: Half of them took no longer.
        slowest_s: The slowest.
    """

    operation: str
    calls: int
    median_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes moved one way.

    Attributes:
        operation: What was done.
        bytes_per_s: How fast.
        moved_bytes: How many.
        cached: Through the page cache: writing may end in memory.
    """

    operation: str
    bytes_per_s: float
    moved_bytes: int
    cached: bool


def latencies(scratch: Scratch) -> list[Latency]:
    """Time the calls of lookups, small stores and touches."""
    calls = scratch.calls
    there = scratch.create("there", bytes(4096))
    page = bytes(4096)

    def look_for_missing(number: int) -> None:
        try:
            calls.stat(f"{scratch.path}/missing-{number}")
        except FileNotFoundError:
            return

    def publish(number: int) -> None:
        path = scratch.create(f"publish-{number}", page)
        calls.rename(path, f"{scratch.path}/published")

    def sync(_: int) -> None:
        fd = calls.open(there, os.O_RDWR)
        try:
            write_whole(calls, fd, memoryview(page))
            calls.sync_data(fd)
        finally:
            calls.close(fd)

    return [
        _repeat(scratch, "look at a file", lambda _: calls.stat(there)),
        _repeat(scratch, "look for a missing file", look_for_missing),
        _repeat(scratch, "read 4 KiB", lambda _: scratch.read(there, 4096)),
        _repeat(scratch, "publish 4 KiB", publish),
        _repeat(scratch, "touch", lambda _: calls.touch(there)),
        _repeat(scratch, "write 4 KiB to the disk", sync),
    ]


def bandwidths(scratch: Scratch, *, size_bytes: int, direct: bool) -> list[Bandwidth]:
    """Write a file and, where the page cache does not get in the way, read it.

    Args:
        scratch: Where.
        size_bytes: The file's length, rounded up to whole pieces.
        direct: Past the page cache, which the filesystem is known to allow.
    """
    piece = memoryview(mmap.mmap(-1, PIECE_BYTES))
    # Bytes that no filesystem compresses.
    piece[:] = hashlib.shake_128(b"prefixstore").digest(PIECE_BYTES)
    pieces = max(1, -(-size_bytes // PIECE_BYTES))
    path, flag = f"{scratch.path}/bytes", os.O_DIRECT if direct else 0
    calls, clock = scratch.calls, scratch.clock

    started_s = clock.monotonic_s()
    fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flag)
    try:
        done = 0
        while done < pieces and clock.monotonic_s() - started_s < 4 * BUDGET_S:
            _write_at(scratch, fd, piece, done * PIECE_BYTES)
            done += 1
        calls.sync_data(fd)
    finally:
        calls.close(fd)
    moved = [_bandwidth("write", done, clock.monotonic_s() - started_s, direct=direct)]
    if direct:
        started_s, read = clock.monotonic_s(), 0
        fd = calls.open(path, os.O_RDONLY | flag)
        try:
            while read < done and clock.monotonic_s() - started_s < 4 * BUDGET_S:
                calls.read_into(fd, piece, read * PIECE_BYTES)
                read += 1
        finally:
            calls.close(fd)
        moved.append(_bandwidth("read", read, clock.monotonic_s() - started_s, direct=True))
    return moved


def _write_at(scratch: Scratch, fd: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        done += scratch.calls.write_from(fd, piece[done:], offset + done)


def _bandwidth(operation: str, pieces: int, elapsed_s: float, *, direct: bool) -> Bandwidth:
    moved_bytes = pieces * PIECE_BYTES
    return Bandwidth(
        operation=operation,
        bytes_per_s=moved_bytes / max(elapsed_s, 1e-9),
        moved_bytes=moved_bytes,
        cached=not direct,
    )


def _repeat(scratch: Scratch, operation: str, call: Callable[[int], object]) -> Latency:
    clock, taken_s = scratch.clock, list[float]()
    end_s = clock.monotonic_s() + BUDGET_S
    for number in range(CALLS_MAX):
        start_s = clock.monotonic_s()
        call(number)
        now_s = clock.monotonic_s()
        taken_s.append(now_s - start_s)
        if now_s >= end_s:
            break
    return Latency(
        operation=operation,
        calls=len(taken_s),
        median_s=median(taken_s),
        slowest_s=max(taken_s),
    )
