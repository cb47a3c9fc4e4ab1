"""What the engine's side asks of the I/O process and what it gets back: plain values.

A **job** is what the engine submitted under one ticket: a find, or the load or store of some chunks.
Each job is completed exactly once, by the I/O process or by its deadline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from prefixstore.keys import Key

__all__ = [
    "ChunkChange",
    "ChunkLoad",
    "ChunkStore",
    "Completion",
    "FindDone",
    "Limits",
    "LoadDone",
    "StoreDone",
    "StoreTarget",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one client; each says what a wrong value costs.

    Attributes:
        buffer_count: Staging buffers. Too few starve the disk; each costs a chunk of memory.
        buffer_bytes: The largest payload.
        load_threads: Reads in flight. Fewer leave a disk idle that is far away; more than it can
            serve at once only wait in the kernel instead of in the queue.
        store_threads: Writes in flight. They share the disk with the loads that requests wait for, so
            there are fewer; too few, and stores are dropped while the disk has nothing to do.
        find_deadline_s: A lookup that is not answered by then is a miss: the longest that a hung
            mount delays one request, once, until the breaker opens.
        load_deadline_s: Loads that make no progress for so long fail, and are recomputed.
        store_deadline_s: The same for stores, which are then lost.
        hang_s: A single operation of this age means a hung mount: its process is replaced.
        breaker_s: How long lookups are missed at once after a deadline passed, before one is tried.
        stores_waiting_max: Chunks that wait for a buffer with their slots pinned; more are dropped,
            so that a slow disk costs hits later rather than slots now.
        processes_stuck_max: Killed processes that a hung mount has not let go of yet; with that
            many, no other is started.
        changes_max: Chunks published or gone that wait to be told to the caller; of more the oldest
            are forgotten. 0 for a caller that does not ask.
    """

    buffer_count: int
    buffer_bytes: int
    load_threads: int = 8
    store_threads: int = 4
    find_deadline_s: float = 2.0
    load_deadline_s: float = 10.0
    store_deadline_s: float = 30.0
    hang_s: float = 20.0
    breaker_s: float = 5.0
    stores_waiting_max: int = 4096
    processes_stuck_max: int = 3
    changes_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTarget:
    """What the I/O process opens.

    Attributes:
        root: The root's path.
        namespace: The namespace's fields, as JSON.
        options: The ``StoreConfig``, as JSON.
    """

    root: str
    namespace: bytes
    options: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLoad:
    """One chunk to load.

    Attributes:
        key: The chunk.
        raw_bytes: The payload's exact length.
        land: Copies the verified payload to where it is wanted. Called on the pump thread, under
            the landing lock, and never after the job was completed. Must not block.
    """

    key: Key
    raw_bytes: int
    land: Callable[[memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkStore:
    """One chunk to store.

    Attributes:
        key: The chunk.
        parent: The key one chunk nearer to the start; None for the first.
        end_token: The number of tokens from the start of the prompt to the chunk's end.
        element_bytes: The size of one KV element, for the shuffle codec.
        raw_bytes: The payload's exact length.
        fill: Copies the payload into the given memory; called like ``ChunkLoad.land``. What it
            reads may change once it has returned.
    """

    key: Key
    parent: Key | None
    end_token: int
    element_bytes: int
    raw_bytes: int
    fill: Callable[[memoryview], None]


@dataclass(slots=True, kw_only=True)
class FindDone:
    """Which keys of a find are stored, in the order asked; all False when nobody could say."""

    ticket: int
    present: list[bool]
    answered: bool


@dataclass(slots=True, kw_only=True)
class LoadDone:
    """How a load ended: which chunks landed, and why the others did not."""

    ticket: int
    landed: list[Key] = field(default_factory=list)
    missed: dict[Key, str] = field(default_factory=dict)
    landed_bytes: int = 0
    read_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class StoreDone:
    """How a store ended: which chunks are published now, and why the others are not."""

    ticket: int
    stored: list[Key] = field(default_factory=list)
    existed: list[Key] = field(default_factory=list)
    skipped: dict[Key, str] = field(default_factory=dict)
    stored_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ChunkChange:
    """A chunk is published now, by us or before us, or is not there any more."""

    key: Key
    gone: bool


Completion = FindDone | LoadDone | StoreDone
