"""What goes into a store and what comes out of it: frozen values, no behaviour worth the name.

Lookups, loads and stores return these for everything that can go wrong with a disk or a mount;
exceptions are left for calls that are wrong in themselves.
"""

from dataclasses import dataclass
from enum import StrEnum

from prefixstore.config import Codec
from prefixstore.keys import Key, NamespaceId

__all__ = [
    "Chunk",
    "EvictionReport",
    "Loaded",
    "NamespaceStats",
    "PlannedGroup",
    "SkipReason",
    "StoreOutcome",
    "StoreStats",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk's place in its prefix.

    Attributes:
        key: Its name.
        parent: The key one chunk nearer to the start, in the same KV group; None for the first.
        end_token: The number of tokens in the prefix that ends with this chunk.
    """

    key: Key
    parent: Key | None = None
    end_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A chunk that was read, verified and decoded into the caller's memory.

    Attributes:
        raw_bytes: The payload's length in the caller's memory.
        stored_bytes: Its length on disk, without header and padding.
    """

    key: Key
    parent: Key | None
    end_token: int
    codec: Codec
    raw_bytes: int
    stored_bytes: int


class SkipReason(StrEnum):
    """Why a chunk was not stored. Stable names: they become metric labels."""

    READ_ONLY = "read_only"
    """The store was opened to serve only."""
    QUOTA = "quota"
    """The root, or the namespace, holds all that it may; eviction has been asked for."""
    LIMITS = "limits"
    """The root's limits cannot be read or understood, so they cannot be kept."""
    LOW_SPACE = "low_space"
    """The filesystem has less room than ``min_free_bytes``."""
    FULL = "full"
    """The filesystem refused for want of space or quota."""
    UNAVAILABLE = "unavailable"
    """The root could not be written."""
    PAUSED = "paused"
    """An earlier write failed; the next attempt is due soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOutcome:
    """What became of one chunk handed to ``store``.

    Attributes:
        existed: The chunk was published before; its bytes were left alone.
        reason: Why the chunk was skipped; None when it is published now.
        stored_bytes: The published payload's length on disk; 0 when skipped.
        detail: A sentence for people when skipped: path, what failed, what to do.
    """

    existed: bool = False
    reason: SkipReason | None = None
    stored_bytes: int = 0
    detail: str = ""

    @property
    def published(self) -> bool:
        """Whether the chunk can be loaded now, by this call's doing or an earlier one's."""
        return self.reason is None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStats:
    """What the index knows of one namespace."""

    namespace: NamespaceId
    chunks: int
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What the index knows of the root, and what this process has done since it opened the store.

    Attributes:
        complete: Every blob that was there at the last full scan is counted. False while the index
            is being rebuilt: figures are then too low.
    """

    chunks: int
    file_bytes: int
    namespaces: tuple[NamespaceStats, ...]
    complete: bool
    index_kind: str
    counters: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """Planned chunks of one namespace that go for one reason.

    Attributes:
        namespace: Where.
        reason: Why.
        chunks: How many.
        file_bytes: Their file bytes.
        oldest_s: When the one that was longest unused was last used, in seconds since the epoch.
        newest_s: When the one that was used last was.
    """

    namespace: NamespaceId
    reason: str
    chunks: int
    file_bytes: int
    oldest_s: int
    newest_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionReport:
    """What an eviction did, or would do.

    Attributes:
        dry_run: Nothing was removed; what would be left is told as if it had been.
        planned_chunks: Chunks that the plan names.
        planned_bytes: Their file bytes.
        evicted_chunks: Chunks that are gone; 0 for a dry run.
        freed_bytes: Their file bytes; 0 for a dry run.
        left_chunks: Chunks of the root that remain.
        left_bytes: Their file bytes.
        reasons: Planned chunks by the reason they were chosen.
        groups: Planned chunks by namespace and reason, the largest first; empty for a removal by key.
        kept: Planned chunks that were left after all, by the reason (in flight, pinned meanwhile,
            an error).
        short_bytes: By how much the target was missed, since the rest is pinned or in use.
        errors: Sentences on what could not be read or removed, the first few; empty when all went
            well.
    """

    dry_run: bool
    planned_chunks: int
    planned_bytes: int
    evicted_chunks: int
    freed_bytes: int
    left_chunks: int
    left_bytes: int
    reasons: dict[str, int]
    groups: tuple[PlannedGroup, ...]
    kept: dict[str, int]
    short_bytes: int
    errors: tuple[str, ...]
