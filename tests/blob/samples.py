"""Headers and payloads for tests: strategies of hypothesis, and a few fixed ones."""

import random
import struct

import xxhash
from hypothesis import strategies as st

from prefixstore.blob.header import FORMAT_VERSION, HEADER_BYTES, BlobHeader
from prefixstore.config import RAW_BYTES_MAX, Codec
from prefixstore.keys import KEY_BYTES_MAX, KEY_BYTES_MIN, Key, NamespaceId

NAMESPACE = NamespaceId("0f" * 16)
KEY = Key(bytes(range(32)) + (1).to_bytes(4, "big"))
PARENT = Key(bytes(range(32, 64)) + (1).to_bytes(4, "big"))

U64 = st.integers(0, 2**64 - 1)


def keys() -> st.SearchStrategy[Key]:
    return st.binary(min_size=KEY_BYTES_MIN, max_size=KEY_BYTES_MAX).map(Key)


@st.composite
def headers(draw) -> BlobHeader:
    codec = draw(st.sampled_from(Codec))
    raw_bytes = draw(st.integers(1, RAW_BYTES_MAX))
    return BlobHeader(
        version=FORMAT_VERSION,
        namespace=NamespaceId(draw(st.binary(min_size=16, max_size=16)).hex()),
        key=draw(keys()),
        parent=draw(st.none() | keys()),
        end_token=draw(U64),
        codec=codec,
        element_bytes=draw(st.integers(1, 16)),
        raw_bytes=raw_bytes,
        stored_bytes=raw_bytes if codec is Codec.RAW else draw(st.integers(1, raw_bytes)),
        payload_digest=draw(st.binary(min_size=16, max_size=16)),
        writer=draw(st.binary(min_size=16, max_size=16)).hex(),
        created_s=draw(U64),
    )


def a_header(**changes: object) -> BlobHeader:
    """One plain header, with changes."""
    fields: dict[str, object] = {
        "version": FORMAT_VERSION,
        "namespace": NAMESPACE,
        "key": KEY,
        "parent": PARENT,
        "end_token": 256,
        "codec": Codec.RAW,
        "element_bytes": 2,
        "raw_bytes": 5000,
        "stored_bytes": 5000,
        "payload_digest": bytes(range(16)),
        "writer": "ab" * 16,
        "created_s": 1_700_000_000,
    }
    return BlobHeader(**(fields | changes))


def sealed(page: bytes | bytearray) -> bytes:
    """Put a fitting checksum on a page: what a hostile writer does."""
    body = bytes(page[: HEADER_BYTES - 16])
    return body + xxhash.xxh3_128_digest(body)


def bfloat16_noise(elements: int, *, seed: int = 0) -> bytes:
    """Numbers as KV has them: alike in their exponents, noise in their mantissas."""
    source = random.Random(seed)
    floats = struct.pack(f"<{elements}f", *(source.gauss(0.0, 0.3) for _ in range(elements)))
    return b"".join(floats[at + 2 : at + 4] for at in range(0, len(floats), 4))
