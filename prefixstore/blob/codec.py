"""How a payload is stored: raw, zstd, or byte planes and then zstd. Lossless, and safe to decode.

**Byte planes** (shuffle): floating-point KV varies little in its exponents and much in its mantissas.
Splitting the bytes of all elements apart, first bytes first, puts like beside like:

    elements of 2 bytes  a0 a1 b0 b1 c0 c1  →  a0 b0 c0 a1 b1 c1

A payload that is no whole number of elements keeps its tail behind the planes, as it is.

**Decoding trusts nothing.** The stored bytes must be one zstd frame from the first to the last: its
header states its size, exactly the size wanted, and a bounded window, and its blocks end where the
stored bytes end. All that is checked before a byte is decoded, and decoding goes into memory of the size
wanted. (zstandard's own ``max_output_size`` is ignored for a frame that states its size: 64 MiB came out
of 2 kB.)

Contexts of zstandard are made for each call: that takes 9 µs, and they are not thread-safe. All loops
over payload bytes run without the GIL.
"""

from typing import Final

import zstandard

from prefixstore.blob.reasons import MissReason
from prefixstore.config import Codec
from prefixstore.errors import CorruptError

__all__ = ["SAMPLE_BYTES", "decode_into", "encode", "is_worth_it"]

LEVEL: Final = 1
"""Higher levels gained nothing on real KV and cost several times as much."""
PLANES_HASH_LOG: Final = 8
"""Planes repeat no strings worth looking for, so level 1's table of 2**14 finds accidents, and pays for
each: on a 135M model's KV (2.9 MB, bf16) a table of 2**8 gives 1.46x instead of 1.45x, encodes at
1.1 GB/s of CPU time instead of 0.6, and decodes at 3.5 GB/s instead of 2.3."""
WINDOW_BYTES_MAX: Final = 8 * 2**20
"""What level 1 uses at the most is 2 MiB; a frame that wants more was not made here."""
SAMPLE_BYTES: Final = 256 * 2**10
"""How much of a payload tells whether the rest compresses."""
WORTH_IT: Final = 0.95
"""Less than 5 % saved does not pay for decoding."""

FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"
BLOCK_HEADER_BYTES: Final = 3
BLOCK_RLE: Final = 1
BLOCK_RESERVED: Final = 3
BLOCK_BYTES_MEAN_MIN: Final = 1024
BLOCKS_SPARE: Final = 8
"""A frame of more blocks than one for each KiB of payload, and these, only costs time to walk."""
CHECKSUM_BYTES: Final = 4


def encode(payload: memoryview, *, codec: Codec, element_bytes: int) -> bytes | memoryview:
    """Return the payload as it is to be stored; for raw, the payload itself."""
    match codec:
        case Codec.RAW:
            return payload
        case Codec.ZSTD:
            return _compress(payload)
        case Codec.SHUFFLE_ZSTD:
            return _compress(_to_planes(payload, element_bytes), hash_log=PLANES_HASH_LOG)


def decode_into(stored: memoryview, out: memoryview, *, codec: Codec, element_bytes: int) -> None:
    """Decode a stored payload into ``out``, which is exactly as long as the payload.

    Args:
        stored: The stored bytes, all of them; must not overlap ``out``.
        out: Receives the payload.
        codec: How it is stored.
        element_bytes: The size of one KV element.

    Raises:
        CorruptError: The stored bytes do not decode to that length; ``out`` is undefined.
    """
    match codec:
        case Codec.RAW:
            if len(stored) != len(out):
                raise _invalid(f"{len(stored)} raw bytes for {len(out)}")
            out[:] = stored
        case Codec.ZSTD:
            _decompress_into(stored, out)
        case Codec.SHUFFLE_ZSTD:
            import numpy as np  # Not needed by readers of raw blobs; takes 0.1 s to import.

            planes = np.empty(len(out), dtype=np.uint8).data
            _decompress_into(stored, planes)
            _from_planes(planes, out, element_bytes)


def is_worth_it(sample: memoryview, *, codec: Codec, element_bytes: int) -> bool:
    """Whether a payload that begins like ``sample`` is worth this codec."""
    encoded = encode(sample, codec=codec, element_bytes=element_bytes)
    return len(encoded) < WORTH_IT * len(sample)


def _compress(payload: memoryview, *, hash_log: int = 0) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, source_size=len(payload), hash_log=hash_log, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(payload)


def _decompress_into(stored: memoryview, out: memoryview) -> None:
    try:
        _check_frame(stored, len(out))
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        # Input and output are whole, so zstd decodes in one pass, without a window of its own: half
        # as long again as it takes to decode into new memory and copy.
        with decompressor.stream_reader(stored, closefd=False) as reader:
            count = reader.readinto(out)
    except zstandard.ZstdError as error:
        raise _invalid(str(error)) from error
    if count != len(out):
        raise _invalid(f"{count} bytes decoded, expected {len(out)}")


def _check_frame(stored: memoryview, size: int) -> None:
    """Refuse anything but one frame, from end to end, of ``size`` bytes in a bounded window."""
    if bytes(stored[:4]) != FRAME_MAGIC:
        raise _invalid("no zstd frame")
    frame = zstandard.get_frame_parameters(stored)
    if frame.content_size != size:
        raise _invalid(f"the frame states {frame.content_size} bytes, expected {size}")
    if frame.window_size > WINDOW_BYTES_MAX or frame.dict_id:
        raise _invalid(f"window of {frame.window_size} bytes or a dictionary: not made here")
    end = _frame_end(stored, size, has_checksum=frame.has_checksum)
    if end != len(stored):
        raise _invalid(f"the frame ends at byte {end} of {len(stored)}")


def _frame_end(stored: memoryview, size: int, *, has_checksum: bool) -> int:
    """Return where a frame ends, by the lengths of its blocks (zstd's own are of 128 KiB)."""
    at = zstandard.frame_header_size(stored)
    for _ in range(size // BLOCK_BYTES_MEAN_MIN + BLOCKS_SPARE):
        if at + BLOCK_HEADER_BYTES > len(stored):
            raise _invalid("the frame has no last block")
        block = int.from_bytes(stored[at : at + BLOCK_HEADER_BYTES], "little")
        is_last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == BLOCK_RESERVED:
            raise _invalid("a block of a reserved kind")
        at += BLOCK_HEADER_BYTES + (1 if kind == BLOCK_RLE else length)
        if is_last:
            return at + (CHECKSUM_BYTES if has_checksum else 0)
    raise _invalid("more blocks than zstd makes")


def _to_planes(payload: memoryview, element_bytes: int) -> memoryview:
    import numpy as np  # See above.

    elements = len(payload) // element_bytes
    body = elements * element_bytes
    source = np.frombuffer(payload, dtype=np.uint8)
    planes = np.empty(len(payload), dtype=np.uint8)
    for place in range(element_bytes):
        planes[place * elements : (place + 1) * elements] = source[place:body:element_bytes]
    planes[body:] = source[body:]
    return planes.data


def _from_planes(planes: memoryview, out: memoryview, element_bytes: int) -> None:
    import numpy as np  # See above.

    elements = len(out) // element_bytes
    body = elements * element_bytes
    source = np.frombuffer(planes, dtype=np.uint8)
    target = np.frombuffer(out, dtype=np.uint8)
    # Plane by plane: 3.2 GB/s; as one transposed copy, 0.55 GB/s.
    for place in range(element_bytes):
        target[place:body:element_bytes] = source[place * elements : (place + 1) * elements]
    target[body:] = source[body:]


def _invalid(why: str) -> CorruptError:
    return CorruptError(MissReason.CODEC, f"the stored payload does not decode: {why}")
