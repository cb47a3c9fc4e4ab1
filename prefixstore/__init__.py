"""A content-addressed, persistent prefix cache for vLLM, shared through a filesystem.

    from prefixstore import Chunk, PrefixStore

The names below are imported when they are first used: ``import prefixstore`` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixstore.config import Codec, Durability, StoreConfig
    from prefixstore.errors import (
        ClosedError,
        CorruptError,
        FullError,
        InvalidError,
        PrefixStoreError,
        UnavailableError,
    )
    from prefixstore.keys import Key, NamespaceId, make_key, namespace_id
    from prefixstore.store import (
        Chunk,
        EvictionReport,
        Loaded,
        Miss,
        PrefixStore,
        SkipReason,
        StoreOutcome,
        StoreStats,
    )
    from prefixstore.tree.buffer import Buffer

__version__ = "0.1.0.dev0"

__all__ = [
    "Buffer",
    "Chunk",
    "ClosedError",
    "Codec",
    "CorruptError",
    "Durability",
    "EvictionReport",
    "FullError",
    "InvalidError",
    "Key",
    "Loaded",
    "Miss",
    "NamespaceId",
    "PrefixStore",
    "PrefixStoreError",
    "SkipReason",
    "StoreConfig",
    "StoreOutcome",
    "StoreStats",
    "UnavailableError",
    "__version__",
    "make_key",
    "namespace_id",
]

_HOMES = {
    "prefixstore.config": ("Codec", "Durability", "StoreConfig"),
    "prefixstore.errors": (
        "ClosedError",
        "CorruptError",
        "FullError",
        "InvalidError",
        "PrefixStoreError",
        "UnavailableError",
    ),
    "prefixstore.keys": ("Key", "NamespaceId", "make_key", "namespace_id"),
    "prefixstore.store": (
        "Chunk",
        "EvictionReport",
        "Loaded",
        "Miss",
        "PrefixStore",
        "SkipReason",
        "StoreOutcome",
        "StoreStats",
    ),
    "prefixstore.tree.buffer": ("Buffer",),
}


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first used."""
    for home, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(home), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'prefixstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
