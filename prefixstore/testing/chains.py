"""Chains of chunks whose bytes tell which chunk they are, for tests of a store.

Each key has one payload that belongs to it, so that a load can be checked without remembering what was
stored: ``payload_of(key)`` is right, everything else is wrong KV.
"""

import hashlib

from prefixstore.keys import Key, make_key
from prefixstore.store import Chunk, Miss, PrefixStore, StoreOutcome

__all__ = [
    "FIELDS",
    "FILE_BYTES",
    "RAW_BYTES",
    "chain",
    "chunk_at",
    "load",
    "payload_of",
    "store_chain",
]

FIELDS = {"model": "tiny", "dtype": "bfloat16"}
"""A namespace."""
RAW_BYTES = 6000
FILE_BYTES = 12288
"""What such a payload takes on disk: a header page and two pages."""
TOKENS = 16


def chain(name: str, length: int) -> list[Key]:
    """Return the keys of a chain; the same name gives the same keys."""
    return [
        make_key(hashlib.sha256(f"{name}/{at}".encode()).digest() + bytes(4))
        for at in range(length)
    ]


def payload_of(key: Key, raw_bytes: int = RAW_BYTES) -> bytes:
    """Return the one payload that belongs to a key; it does not compress."""
    return hashlib.shake_128(key).digest(raw_bytes)


def chunk_at(keys: list[Key], at: int) -> Chunk:
    """Return the chunk at a place of a chain."""
    return Chunk(key=keys[at], parent=keys[at - 1] if at else None, end_token=(at + 1) * TOKENS)


def store_chain(store: PrefixStore, keys: list[Key]) -> list[StoreOutcome]:
    """Store every chunk of a chain, in order, each with its own payload."""
    return [store.store(chunk_at(keys, at), payload_of(keys[at])) for at in range(len(keys))]


def load(store: PrefixStore, key: Key) -> bytes | str:
    """Return a chunk's bytes, or the reason why it cannot be loaded."""
    out = bytearray(RAW_BYTES)
    found = store.load(key, out, raw_bytes=RAW_BYTES)
    return str(found.reason) if isinstance(found, Miss) else bytes(out)
