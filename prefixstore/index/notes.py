"""Bytes of the notes table, sums for each namespace and marks: pure, no LMDB.

    key                        value, little-endian
    "s" + namespace (16)       chunks (8) | file_bytes (8) | presumed (8) | XXH32 (4)
    "m" + name in UTF-8        text in UTF-8 | XXH32 (4)

Each checksum covers the key and the value before it, and is big-endian.
"""

import struct

import xxhash

from prefixstore.index.base import Totals
from prefixstore.index.records import NAMESPACE_BYTES
from prefixstore.keys import NamespaceId

__all__ = [
    "SUMS_TAG",
    "decode_mark",
    "decode_sums",
    "encode_mark",
    "encode_sums",
    "mark_key",
    "sums_key",
    "sums_namespace",
]

SUMS_TAG = b"s"
MARK_TAG = b"m"
SUMS = struct.Struct("<QQQ")
CHECKSUM_BYTES = 4


def sums_key(prefix: bytes) -> bytes:
    """Return where the sums of a namespace stand; ``prefix`` as of ``records.namespace_prefix``."""
    return SUMS_TAG + prefix


def sums_namespace(key: bytes) -> NamespaceId:
    """Return the namespace that a key of sums names."""
    return NamespaceId(key[len(SUMS_TAG) : len(SUMS_TAG) + NAMESPACE_BYTES].hex())


def encode_sums(key: bytes, totals: Totals) -> bytes:
    """Return the value of a namespace's sums."""
    return _sealed(key, SUMS.pack(*totals))


def decode_sums(key: bytes, value: bytes) -> Totals | None:
    """Return a namespace's sums, or None if the value is not what was written."""
    body = _unsealed(key, value)
    return Totals(*SUMS.unpack(body)) if body is not None and len(body) == SUMS.size else None


def mark_key(name: str) -> bytes:
    """Return where a mark stands."""
    return MARK_TAG + name.encode()


def encode_mark(key: bytes, text: str) -> bytes:
    """Return the value of a mark."""
    return _sealed(key, text.encode())


def decode_mark(key: bytes, value: bytes) -> str | None:
    """Return a mark's text, or None if the value is not what was written."""
    body = _unsealed(key, value)
    return None if body is None else body.decode()


def _sealed(key: bytes, body: bytes) -> bytes:
    return body + xxhash.xxh32_digest(key + body)


def _unsealed(key: bytes, value: bytes) -> bytes | None:
    body = value[:-CHECKSUM_BYTES]
    return body if value.endswith(xxhash.xxh32_digest(key + body)) else None
