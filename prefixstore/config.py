"""Settings of a store, validated once, frozen afterwards.

Nothing here reads the environment or a file: the command line and ``prefixstore.vllm`` do, and hand
over a mapping. Every queue, cache and document has its limit here, with the cost of a wrong value.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, Self

import msgspec
from msgspec import Meta

from prefixstore.errors import InvalidError

__all__ = [
    "DOCUMENT_BYTES_MAX",
    "PREFIX_CHUNKS_MAX",
    "RAW_BYTES_MAX",
    "Codec",
    "Durability",
    "StoreConfig",
]

DOCUMENT_BYTES_MAX = 64 * 2**20
"""No JSON document of ours is larger; a longer file is not read.

A pin of a million chunks is 73 MB of hex and would be refused: pin the prefixes apart.
"""

RAW_BYTES_MAX = 2**30
"""The largest payload of one chunk: refuses a lying header before memory is reserved for it.

A 16-token block of a 70B model with full heads is 5 MB; a state of a large hybrid model 200 MB.
"""

PREFIX_CHUNKS_MAX = 2**20
"""The longest chain that one lookup walks: 16 million tokens in 16-token blocks."""


class Codec(StrEnum):
    """How a blob's payload is stored."""

    RAW = "raw"
    ZSTD = "zstd"
    SHUFFLE_ZSTD = "shuffle+zstd"


class Durability(StrEnum):
    """What a power cut may take from a chunk that was published."""

    NONE = "none"
    """Anything not yet written back; a torn file is found by its length and digest: a miss."""
    DATA = "data"
    """Nothing but, rarely, the name: the payload is on the disk before the name appears."""
    FULL = "full"
    """Nothing: the directory entry is on the disk, too, before the store returns."""


Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one opened store.

    Attributes:
        durability: What a power cut may take; see ``Durability``.
        codec: The codec of new blobs; ``auto`` samples payloads and stores raw where it does not pay.
        direct_io: Read and write blobs past the page cache where the root allows it. ``auto`` probes.
        read_only: Serve loads; store, touch, evict and quarantine nothing.
        max_bytes: The quota of the whole root; None leaves it to the limits of the root.
        min_free_bytes: Stores stop while the filesystem has less room than this.
        index_dir: Where the index lives, on a local filesystem; None picks the caller's default.
        index_map_bytes: Address space reserved for the index at first; it doubles when full.
        miss_ttl_s: How long a missing key is believed missing: the longest delay before a chunk
            published by another host is found.
        misses_max: How many missing keys are remembered; at 100 bytes each.
        touch_interval_s: A blob's time on disk is refreshed at most once in this interval. Larger
            values cost the eviction order of other hosts; smaller ones cost a metadata write a hit.
        group_shared: Files and directories are writable by the group, for roots that several users
            share (setgid directories).
        quarantine_bytes_max: Corrupt blobs kept for inspection; the oldest go first.
    """

    durability: Durability = Durability.NONE
    codec: Literal["auto", "raw", "zstd", "shuffle+zstd"] = "raw"
    direct_io: Literal["auto", "on", "off"] = "auto"
    read_only: bool = False
    max_bytes: Positive | None = None
    min_free_bytes: Annotated[int, Meta(ge=0)] = 0
    index_dir: str | None = None
    index_map_bytes: Annotated[int, Meta(ge=2**20)] = 2**30
    miss_ttl_s: Seconds = 1.0
    misses_max: Positive = 2**17
    touch_interval_s: Seconds = 1200.0
    group_shared: bool = False
    quarantine_bytes_max: Annotated[int, Meta(ge=0)] = 2**30

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> Self:
        """Build settings from parsed JSON; unknown names and wrong types are refused by name.

        Raises:
            InvalidError: An option is unknown, has the wrong type or is out of range.
        """
        try:
            return msgspec.convert(dict(options), cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise InvalidError(f"store options: {error}. Known options: {known}") from error
