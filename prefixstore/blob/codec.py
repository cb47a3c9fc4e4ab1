"""How a payload is stored: raw, zstd, or byte planes and then zstd. Lossless, and safe to decode.

**Byte planes** (shuffle): floating-point KV varies little in its exponents and much in its mantissas.
Splitting the bytes of all elements apart, first bytes first, puts like beside like:

    elements of 2 bytes  a0 a1 b0 b1 c0 c1  →  a0 b0 c0 a1 b1 c1

A payload that is no whole number of elements keeps its tail behind the planes, as it is.

Decoding trusts nothing: the frame must state its size, exactly the size wanted, in a bounded window,
and end where the stored bytes end. (zstandard ignores ``max_output_size`` for a frame that states its
size, so the size is checked before any memory is touched.)
"""

from typing import Final

import zstandard

from prefixstore.blob.reasons import MissReason
from prefixstore.config import Codec
from prefixstore.errors import CorruptError

__all__ = ["SAMPLE_BYTES", "decode_into", "encode", "is_worth_it"]

LEVEL: Final = 1
"""Higher levels gained nothing on real KV and cost several times as much."""
WINDOW_BYTES_MAX: Final = 8 * 2**20
"""What level 1 uses at the most is 512 KiB; a frame that wants more was not made here."""
SAMPLE_BYTES: Final = 256 * 2**10
"""How much of a payload tells whether the rest compresses."""
WORTH_IT: Final = 0.95
"""Less than 5 % saved does not pay for decoding."""


def encode(payload: memoryview, *, codec: Codec, element_bytes: int) -> bytes | memoryview:
    """Return the payload as it is to be stored. Holds the GIL only briefly."""
    match codec:
        case Codec.RAW:
            return payload
        case Codec.ZSTD:
            return _compress(payload)
        case Codec.SHUFFLE_ZSTD:
            return _compress(_to_planes(payload, element_bytes))


def decode_into(stored: memoryview, out: memoryview, *, codec: Codec, element_bytes: int) -> None:
    """Decode a stored payload into ``out``, which is exactly as long as the payload.

    Raises:
        CorruptError: The stored bytes do not decode to that length; ``out`` is undefined.
    """
    match codec:
        case Codec.RAW:
            if len(stored) != len(out):
                raise _invalid(f"{len(stored)} raw bytes for {len(out)}")
            out[:] = stored
        case Codec.ZSTD:
            out[:] = _decompress(stored, len(out))
        case Codec.SHUFFLE_ZSTD:
            _from_planes(_decompress(stored, len(out)), out, element_bytes)


def is_worth_it(sample: memoryview, *, codec: Codec, element_bytes: int) -> bool:
    """Whether a payload that begins like ``sample`` is worth this codec."""
    encoded = encode(sample, codec=codec, element_bytes=element_bytes)
    return len(encoded) < WORTH_IT * len(sample)


def _compress(payload: memoryview | bytes) -> bytes:
    # A context is made for each call: it takes microseconds, and contexts are not thread-safe.
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(payload)


def _decompress(stored: memoryview, size: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != size:
            raise _invalid(f"the frame states {frame.content_size} bytes, expected {size}")
        if frame.window_size > WINDOW_BYTES_MAX or frame.dict_id:
            raise _invalid(f"window of {frame.window_size} bytes or a dictionary: not made here")
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        raw = decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _invalid(str(error)) from error
    if len(raw) != size:
        raise _invalid(f"{len(raw)} bytes decoded, expected {size}")
    return raw


def _to_planes(payload: memoryview, element_bytes: int) -> memoryview:
    import numpy as np  # Not needed by readers and writers of raw blobs; takes 0.1 s to import.

    elements, tail = divmod(len(payload), element_bytes)
    source = np.frombuffer(payload, dtype=np.uint8)
    planes = np.empty(len(payload), dtype=np.uint8)
    body = elements * element_bytes
    # Copies of whole arrays let go of the GIL.
    planes[:body].reshape(element_bytes, elements)[:] = (
        source[:body].reshape(elements, element_bytes).T
    )
    if tail:
        planes[body:] = source[body:]
    return planes.data


def _from_planes(planes: bytes, out: memoryview, element_bytes: int) -> None:
    import numpy as np  # See above.

    elements, tail = divmod(len(out), element_bytes)
    source = np.frombuffer(planes, dtype=np.uint8)
    target = np.frombuffer(out, dtype=np.uint8)
    body = elements * element_bytes
    target[:body].reshape(elements, element_bytes)[:] = (
        source[:body].reshape(element_bytes, elements).T
    )
    if tail:
        target[body:] = source[body:]


def _invalid(why: str) -> CorruptError:
    return CorruptError(MissReason.CODEC, f"the stored payload does not decode: {why}")
