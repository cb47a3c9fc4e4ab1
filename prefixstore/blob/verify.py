"""The checks between bytes that were read and bytes that are served: each names its reason."""

import xxhash

from prefixstore.blob.header import HEADER_BYTES, BlobHeader, decode_header, file_bytes
from prefixstore.blob.reasons import MissReason
from prefixstore.errors import CorruptError
from prefixstore.keys import Key, NamespaceId

__all__ = ["MissReason", "check_header", "check_image", "check_payload"]


def check_header(
    header: BlobHeader,
    *,
    namespace: NamespaceId,
    key: Key,
    raw_bytes: int | None,
    file_bytes: int | None,
) -> MissReason | None:
    """Hold a valid header against what was asked for.

    Args:
        header: The header found.
        namespace: The namespace expected.
        key: The key expected.
        raw_bytes: The payload's length expected; None accepts any.
        file_bytes: The length of the file it was found in; None if that is not known.

    Returns:
        The first reason not to serve this blob, or None.
    """
    if header.namespace != namespace:
        return MissReason.NAMESPACE
    if header.key != key:
        return MissReason.KEY
    if raw_bytes is not None and header.raw_bytes != raw_bytes:
        return MissReason.SIZE
    if file_bytes is not None and _file_bytes(header) != file_bytes:
        return MissReason.TORN
    return None


def check_payload(header: BlobHeader, stored: memoryview) -> MissReason | None:
    """Hold the stored payload against the header's digest."""
    if len(stored) != header.stored_bytes:
        return MissReason.TORN
    if xxhash.xxh3_128_digest(stored) != header.payload_digest:
        return MissReason.DIGEST
    return None


def check_image(image: memoryview) -> BlobHeader:
    """Hold a whole file image against itself: header, length, digest, and the zeros behind the payload.

    Stricter than a load, which has no use for what lies behind: a file that travels arrives as it was made.

    What it stores is not decoded: a payload that does not decode is found by the load that tries.

    Raises:
        CorruptError: It is no sound blob.
    """
    if len(image) <= HEADER_BYTES:
        raise CorruptError(MissReason.TORN, f"{len(image)} bytes are no blob")
    header = decode_header(image[:HEADER_BYTES])
    reason = check_header(
        header,
        namespace=header.namespace,
        key=header.key,
        raw_bytes=None,
        file_bytes=len(image),
    ) or check_payload(header, image[HEADER_BYTES : HEADER_BYTES + header.stored_bytes])
    if reason is not None:
        raise CorruptError(reason, f"a blob of {len(image)} bytes fails its check: {reason}")
    padding = image[HEADER_BYTES + header.stored_bytes :]
    if padding != bytes(len(padding)):
        raise CorruptError(MissReason.DIGEST, f"a blob of {len(image)} bytes does not end in zeros")
    return header


def _file_bytes(header: BlobHeader) -> int:
    return file_bytes(header.stored_bytes)
