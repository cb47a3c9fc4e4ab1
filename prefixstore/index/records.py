"""What the index knows of one chunk, and its bytes: pure, no LMDB.

A row's value, little-endian:

    offset  bytes  field
         0      1  version, 1
         1      1  flags: bit 0 presumed; the other bits are zero
         2      1  length of the parent key, 0 = none known
         3      1  zero
         4      4  file_bytes
         8      4  raw_bytes
        12      4  end_token
        16      4  used_s
        20      4  touched_s
        24      4  children: how many rows name this key as parent
        28      n  parent key
      28+n      4  XXH32 over the row's key and every byte before, big-endian

LMDB has no checksum of its own and serves flipped bits without a word, so each value carries one; it
covers the key as well, so a value that wanders to another key is found. A row that fails is absent.

A row's key is the namespace id (16 bytes) and the chunk's key. The recency table has no values; its
keys sort oldest first and, within one second, deepest first, big-endian:

    used_s (4) | 2**32 - 1 - end_token (4) | row key

so that a chain touched at one moment is met leaf first, in the order in which it can be evicted.
"""

import functools
import struct
from typing import NewType

import msgspec
import xxhash

from prefixstore.errors import InvalidError
from prefixstore.keys import KEY_BYTES_MAX, Key, NamespaceId

__all__ = [
    "COUNT_MAX",
    "NAMESPACE_BYTES",
    "Record",
    "RowKey",
    "check_record",
    "decode_count",
    "decode_row",
    "encode_count",
    "encode_row",
    "merge",
    "namespace_prefix",
    "recency_key",
    "recency_row_key",
    "split_row_key",
]

RowKey = NewType("RowKey", bytes)
"""Namespace id and chunk key, as bytes."""

COUNT_MAX = 2**32 - 1
"""The largest value of any field; seconds reach 2106, sizes are refused far below by the blob."""

NAMESPACE_BYTES = 16
VERSION = 1
PRESUMED = 1
HEAD = struct.Struct("<BBBxIIIIII")
CHECKSUM_BYTES = 4
RECENCY = struct.Struct(">II")
COUNT = struct.Struct("<I")


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of one chunk. Zero and None say "not known yet".

    A Struct and not a dataclass: a lookup builds thousands, and a frozen dataclass takes five times
    as long. It holds numbers and bytes only, so the garbage collector need not look.

    Attributes:
        file_bytes: Size of the blob's file: header, stored payload and padding.
        raw_bytes: Size of the payload once decoded.
        end_token: Tokens up to and including the chunk; grows along a chain.
        parent: The key one chunk nearer to the start; None for a first chunk, too.
        used_s: When the chunk was last of use, in whole seconds since the epoch.
        touched_s: When this host last set the blob's time on disk, by the same clock as ``used_s``.
        presumed: Nothing has seen the blob; it is believed in because a chunk further along its
            chain exists. Its sizes are 0.
    """

    file_bytes: int = 0
    raw_bytes: int = 0
    end_token: int = 0
    parent: Key | None = None
    used_s: int = 0
    touched_s: int = 0
    presumed: bool = False


def merge(old: Record, new: Record) -> Record:
    """Join two records of one key: facts of ``new`` where it has any, times never go back.

    A key names its prefix, so its depth and parent cannot change, only become known.

    >>> old = Record(file_bytes=8192, raw_bytes=4096, end_token=32, used_s=7)
    >>> merge(old, Record(used_s=9, presumed=True)) == Record(
    ...     file_bytes=8192, raw_bytes=4096, end_token=32, used_s=9
    ... )
    True
    """
    return Record(
        file_bytes=new.file_bytes or old.file_bytes,
        raw_bytes=new.raw_bytes or old.raw_bytes,
        end_token=new.end_token or old.end_token,
        parent=new.parent or old.parent,
        used_s=max(new.used_s, old.used_s),
        touched_s=max(new.touched_s, old.touched_s),
        presumed=new.presumed and old.presumed,
    )


def check_record(record: Record) -> None:
    """Refuse a record that a row cannot hold.

    Raises:
        InvalidError: A number is negative or above ``COUNT_MAX``, or the parent is no key.
    """
    encode_row(b"", record, children=0)


@functools.lru_cache(maxsize=256)
def namespace_prefix(namespace: NamespaceId) -> bytes:
    """Return the first bytes of every row key of a namespace.

    Raises:
        InvalidError: It is not 32 hex digits.
    """
    try:
        prefix = bytes.fromhex(namespace)
    except ValueError:
        prefix = b""
    if len(prefix) != NAMESPACE_BYTES:
        raise InvalidError(f"a namespace id is 32 hex digits, this is not: {namespace[:80]!r}")
    return prefix


def split_row_key(row_key: bytes) -> tuple[NamespaceId, Key]:
    """Return the namespace and the key that a row key was made of."""
    return NamespaceId(row_key[:NAMESPACE_BYTES].hex()), Key(row_key[NAMESPACE_BYTES:])


def encode_row(row_key: bytes, record: Record, *, children: int) -> bytes:
    """Return the value of a row.

    Raises:
        InvalidError: A field is negative or above ``COUNT_MAX``.
    """
    parent = record.parent or b""
    if len(parent) > KEY_BYTES_MAX:
        raise InvalidError(f"a parent key has at most {KEY_BYTES_MAX} bytes, not {len(parent)}")
    try:
        head = HEAD.pack(
            VERSION,
            PRESUMED if record.presumed else 0,
            len(parent),
            record.file_bytes,
            record.raw_bytes,
            record.end_token,
            record.used_s,
            record.touched_s,
            children,
        )
    except struct.error as error:
        raise InvalidError(f"an index row holds integers of 0 to {COUNT_MAX}: {record}") from error
    body = head + parent
    return body + xxhash.xxh32_digest(row_key + body)


def decode_row(row_key: bytes, value: bytes) -> tuple[Record, int] | None:
    """Return the record and its children, or None if the value is not what was written."""
    body = value[:-CHECKSUM_BYTES]
    if len(body) < HEAD.size or not value.endswith(xxhash.xxh32_digest(row_key + body)):
        return None
    version, flags, parent_bytes, file_bytes, raw_bytes, end_token, used_s, touched_s, children = (
        HEAD.unpack_from(body)
    )
    if version != VERSION or len(body) != HEAD.size + parent_bytes:
        return None
    record = Record(
        file_bytes=file_bytes,
        raw_bytes=raw_bytes,
        end_token=end_token,
        parent=Key(body[HEAD.size :]) if parent_bytes else None,
        used_s=used_s,
        touched_s=touched_s,
        presumed=bool(flags & PRESUMED),
    )
    return record, children


def encode_count(row_key: bytes, count: int) -> bytes:
    """Return the value of a bare counter, with its checksum."""
    if not 0 <= count <= COUNT_MAX:
        raise InvalidError(f"an index counter is 0 to {COUNT_MAX}, not {count}")
    digits = COUNT.pack(count)
    return digits + xxhash.xxh32_digest(row_key + digits)


def decode_count(row_key: bytes, value: bytes) -> int | None:
    """Return the counter, or None if the value is not what was written."""
    digits = value[:-CHECKSUM_BYTES]
    if len(digits) != COUNT.size or not value.endswith(xxhash.xxh32_digest(row_key + digits)):
        return None
    count: int = COUNT.unpack(digits)[0]
    return count


def recency_key(row_key: bytes, *, used_s: int, end_token: int) -> bytes:
    """Return where a row stands in the order of eviction.

    Raises:
        InvalidError: A number is negative or above ``COUNT_MAX``.
    """
    try:
        return RECENCY.pack(used_s, COUNT_MAX - end_token) + row_key
    except struct.error as error:
        raise InvalidError(
            f"used_s and end_token are 0 to {COUNT_MAX}, not {used_s}, {end_token}"
        ) from error


def recency_row_key(recency: bytes) -> bytes:
    """Return the row key at the end of a recency key."""
    return recency[RECENCY.size :]
