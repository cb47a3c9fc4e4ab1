"""The header of a blob: one page that says all there is to know of the payload behind it.

All integers are little-endian. A blob's file is the header, the stored payload, and zeros up to a whole
number of 4096-byte pages, so that its length alone tells a torn file.

    offset  bytes  field
         0      8  magic: "PFXSTORE"
         8      2  format version
        10      1  codec: 0 raw, 1 zstd, 2 shuffle+zstd
        11      1  element bytes: the size of one KV element
        12      1  key length
        13      1  parent length, 0 for none
        14      2  zero
        16      8  raw bytes: the payload's length once decoded
        24      8  stored bytes: the payload's length in this file
        32      8  end token: tokens from the prompt's start to the chunk's end
        40      8  created, in seconds since the epoch, by the writer's clock
        48     16  namespace id
        64     16  writer id
        80     16  XXH3-128 of the stored payload, big-endian as the canonical form is
        96     64  key, then zeros
       160     64  parent key, then zeros
       224   3856  zero
      4080     16  XXH3-128 of bytes 0 to 4079

A header is valid if its checksum fits, every "zero" is zero, the lengths are in their limits, the codec
is known, and a raw payload is stored at its own length. Magic, version, the header's size and its
checksum keep their places in every version, so that an old reader knows a newer blob from a damaged one.
Version 1 is the first; a reader accepts its own version and the one before.
"""

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from prefixstore.blob.reasons import MissReason
from prefixstore.config import RAW_BYTES_MAX, Codec
from prefixstore.errors import CorruptError
from prefixstore.keys import KEY_BYTES_MAX, KEY_BYTES_MIN, Key, NamespaceId

__all__ = [
    "ALIGN_BYTES",
    "FILE_BYTES_MAX",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "BlobHeader",
    "decode_header",
    "encode_header",
    "encode_header_into",
    "file_bytes",
]

HEADER_BYTES: Final = 4096
"""A page, so that the payload behind it is aligned for O_DIRECT and for DMA."""
ALIGN_BYTES: Final = 4096
FORMAT_VERSION: Final = 1
OLDEST_VERSION: Final = 1

MAGIC = b"PFXSTORE"
_FIELDS = struct.Struct("<8sHBBBBHQQQQ16s16s16s64s64s")
_CHECKED_BYTES = HEADER_BYTES - 16
_PADDING = bytes(_CHECKED_BYTES - _FIELDS.size)
_CODECS = (Codec.RAW, Codec.ZSTD, Codec.SHUFFLE_ZSTD)
_CODEC_NUMBERS = {codec: number for number, codec in enumerate(_CODECS)}
_RAW = _CODEC_NUMBERS[Codec.RAW]
ELEMENT_BYTES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobHeader:
    """A header's fields.

    Attributes:
        version: The format version it is written in.
        namespace: The namespace that the payload belongs to.
        key: The chunk's key.
        parent: The key one chunk nearer to the start, None for the first chunk.
        end_token: Tokens from the start of the prompt to the chunk's end.
        codec: How the payload is stored.
        element_bytes: The size of one KV element.
        raw_bytes: The payload's length, decoded.
        stored_bytes: The payload's length in the file.
        payload_digest: XXH3-128 of the stored payload, 16 bytes.
        writer: The writer's id, 32 hex digits.
        created_s: Seconds since the epoch by the writer's clock; for people, never compared.
    """

    version: int
    namespace: NamespaceId
    key: Key
    parent: Key | None
    end_token: int
    codec: Codec
    element_bytes: int
    raw_bytes: int
    stored_bytes: int
    payload_digest: bytes
    writer: str
    created_s: int


def file_bytes(stored_bytes: int) -> int:
    """Return the length of a blob's file.

    >>> file_bytes(1), file_bytes(4096), file_bytes(4097)
    (8192, 8192, 12288)
    """
    return HEADER_BYTES + -(-stored_bytes // ALIGN_BYTES) * ALIGN_BYTES


FILE_BYTES_MAX: Final = file_bytes(RAW_BYTES_MAX)
"""No blob's file is longer."""


def encode_header(header: BlobHeader) -> bytes:
    """Return the header's page."""
    page = bytearray(HEADER_BYTES)
    encode_header_into(header, memoryview(page))
    return bytes(page)


def encode_header_into(header: BlobHeader, page: memoryview) -> None:
    """Write the header into a page of ``HEADER_BYTES``, all of it."""
    parent = header.parent or b""
    # What no reader would accept must not be written; struct would cut a longer key without a word.
    assert max(len(header.key), len(parent)) <= KEY_BYTES_MAX, "keys come from make_key"
    assert 1 <= header.stored_bytes <= header.raw_bytes <= RAW_BYTES_MAX, header
    assert header.codec is not Codec.RAW or header.stored_bytes == header.raw_bytes, header
    assert 1 <= header.element_bytes <= ELEMENT_BYTES_MAX, header
    _FIELDS.pack_into(
        page,
        0,
        MAGIC,
        header.version,
        _CODEC_NUMBERS[header.codec],
        header.element_bytes,
        len(header.key),
        len(parent),
        0,
        header.raw_bytes,
        header.stored_bytes,
        header.end_token,
        header.created_s,
        bytes.fromhex(header.namespace),
        bytes.fromhex(header.writer),
        header.payload_digest,
        header.key,
        parent,
    )
    page[_FIELDS.size : _CHECKED_BYTES] = _PADDING
    page[_CHECKED_BYTES:HEADER_BYTES] = xxhash.xxh3_128_digest(page[:_CHECKED_BYTES])


def decode_header(page: bytes | memoryview) -> BlobHeader:
    """Read a header's page.

    Raises:
        CorruptError: The page is no valid header; ``reason`` is "header" or "version".
    """
    if len(page) < HEADER_BYTES:
        raise _invalid(f"{len(page)} bytes, a header has {HEADER_BYTES}")
    page = bytes(page[:HEADER_BYTES])  # Bytes compare three times as fast as views.
    if page[_CHECKED_BYTES:HEADER_BYTES] != xxhash.xxh3_128_digest(page[:_CHECKED_BYTES]):
        raise _invalid("the checksum does not fit")
    (
        magic,
        version,
        codec,
        element_bytes,
        key_length,
        parent_length,
        zero,
        raw_bytes,
        stored_bytes,
        end_token,
        created_s,
        namespace,
        writer,
        payload_digest,
        key,
        parent,
    ) = _FIELDS.unpack_from(page)
    if magic != MAGIC:
        raise _invalid(f"magic {magic!r}, expected {MAGIC!r}")
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise CorruptError(
            MissReason.VERSION,
            f"format version {version}, this reader knows {OLDEST_VERSION} to {FORMAT_VERSION}",
        )
    if zero or page[_FIELDS.size : _CHECKED_BYTES] != _PADDING:
        raise _invalid("bytes that must be zero are not")
    if codec >= len(_CODECS) or not 1 <= element_bytes <= ELEMENT_BYTES_MAX:
        raise _invalid(f"codec {codec} of {element_bytes}-byte elements is unknown")
    if not 1 <= stored_bytes <= raw_bytes <= RAW_BYTES_MAX:
        raise _invalid(f"{stored_bytes} stored bytes for {raw_bytes} raw bytes are out of range")
    if codec == _RAW and stored_bytes != raw_bytes:
        raise _invalid(f"{stored_bytes} bytes stored raw cannot be {raw_bytes} bytes")
    return BlobHeader(
        version=version,
        namespace=NamespaceId(namespace.hex()),
        key=_key(key, key_length),
        parent=_key(parent, parent_length) if parent_length or parent.strip(b"\0") else None,
        end_token=end_token,
        codec=_CODECS[codec],
        element_bytes=element_bytes,
        raw_bytes=raw_bytes,
        stored_bytes=stored_bytes,
        payload_digest=payload_digest,
        writer=writer.hex(),
        created_s=created_s,
    )


def _key(padded: bytes, length: int) -> Key:
    if not KEY_BYTES_MIN <= length <= KEY_BYTES_MAX or padded[length:].strip(b"\0"):
        raise _invalid(f"a key of {length} bytes in {padded.hex()}")
    return Key(padded[:length])


def _invalid(why: str) -> CorruptError:
    return CorruptError(MissReason.HEADER, f"not a valid blob header: {why}")
