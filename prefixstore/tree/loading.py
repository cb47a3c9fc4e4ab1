"""How a blob is read: one open, one read, one close; then every check, before a byte is believed.

    file ──one read──> buffer: header | payload ──header──> namespace, key, sizes, length
                                                ──digest──> the stored bytes are those written
                                                ──codec───> decoded over themselves, by way of scratch

The read asks for one page more than a blob of the expected size has, so it also tells a file that is too
long. A read that is cut short is taken up again until the file ends. Names and ``stat`` are hints on a
shared filesystem; that a file is gone can be said by any call.
"""

import os
from dataclasses import dataclass

from prefixstore.blob import codec as codecs
from prefixstore.blob.header import (
    ALIGN_BYTES,
    HEADER_BYTES,
    BlobHeader,
    decode_header,
    file_bytes,
)
from prefixstore.blob.reasons import MissReason
from prefixstore.blob.verify import check_header, check_image, check_payload
from prefixstore.config import Codec
from prefixstore.errors import CorruptError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.buffer import Buffer, ThreadBuffer
from prefixstore.tree.direct import DirectIo
from prefixstore.tree.osfs import Os
from prefixstore.tree.paths import Layout
from prefixstore.tree.trouble import is_absence, translate

__all__ = ["Loader", "Miss"]

READS_MAX = 256
"""Reads of one file before it counts as torn: a filesystem that gives less than a 256th of a blob at a
time serves nobody."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a load brought nothing; never an exception, always safe to compute the chunk again."""

    reason: MissReason
    detail: str = ""


class Loader:
    """Reads the blobs of one root. Safe for concurrent use by threads, each with its own buffer."""

    def __init__(
        self, calls: Os, layout: Layout, *, direct: DirectIo, scratch: ThreadBuffer
    ) -> None:
        self._os = calls
        self._layout = layout
        self._direct = direct
        self._scratch = scratch

    def load(
        self, namespace: NamespaceId, key: Key, buffer: Buffer, *, raw_bytes: int
    ) -> BlobHeader | Miss:
        """Read a blob into ``buffer`` and verify it; see ``BlobTree.load``."""
        limit = file_bytes(raw_bytes) + ALIGN_BYTES
        assert limit <= len(buffer.image), f"{raw_bytes} bytes, {buffer.capacity_bytes} fit"
        path = self._layout.blob(namespace, key)
        try:
            header, length = self._read_file(path, buffer.image[:limit])
        except OSError as error:
            return self._missed(error, path)
        except CorruptError as error:
            return Miss(MissReason(error.reason), f"{path}: {error}")
        reason = check_header(
            header, namespace=namespace, key=key, raw_bytes=raw_bytes, file_bytes=length
        ) or check_payload(header, buffer.payload(header.stored_bytes))
        if reason is not None:
            return Miss(reason, f"{path}: {reason}")
        if header.codec is not Codec.RAW:
            try:
                self._decode(header, buffer)
            except CorruptError as error:
                return Miss(MissReason.CODEC, f"{path}: {error}")
        return header

    def read_image(
        self, namespace: NamespaceId, key: Key, buffer: Buffer
    ) -> tuple[BlobHeader, memoryview] | Miss:
        """Read a blob's whole file and verify it, decoding nothing; see ``BlobTree.read_image``."""
        path = self._layout.blob(namespace, key)
        try:
            header, length = self._read_file(path, buffer.image)
            image = buffer.image[: min(file_bytes(header.stored_bytes), length)]
            check_image(image)
        except OSError as error:
            return self._missed(error, path)
        except CorruptError as error:
            return Miss(MissReason(error.reason), f"{path}: {error}")
        reason = check_header(
            header, namespace=namespace, key=key, raw_bytes=None, file_bytes=length
        )
        return (header, image) if reason is None else Miss(reason, f"{path}: {reason}")

    def read_header(self, namespace: NamespaceId, key: Key) -> BlobHeader | Miss:
        """Read and verify a blob's header only; says nothing of its payload or its length."""
        try:
            return self.examine(namespace, key)
        except OSError as error:
            return self._missed(error, self._layout.blob(namespace, key))

    def examine(self, namespace: NamespaceId, key: Key) -> BlobHeader | Miss:
        """Do as ``read_header``, but raise ``OSError`` when the filesystem fails or has no such file."""
        path = self._layout.blob(namespace, key)
        page = memoryview(bytearray(HEADER_BYTES))
        fd = self._os.open(path, os.O_RDONLY)
        try:
            length = self._read_on(fd, page, done=0, wanted=HEADER_BYTES)
        finally:
            self._close(fd)
        try:
            header = _header_of(page, length)
        except CorruptError as error:
            return Miss(MissReason(error.reason), f"{path}: {error}")
        reason = check_header(header, namespace=namespace, key=key, raw_bytes=None, file_bytes=None)
        return header if reason is None else Miss(reason, f"{path}: {reason}")

    def _read_file(self, path: str, image: memoryview) -> tuple[BlobHeader, int]:
        """Read a file up to the end of ``image``; return its header and how much there was."""
        flag = self._direct.flag
        try:
            fd = self._os.open(path, os.O_RDONLY | flag)
            try:
                length = self._read_on(fd, image, done=0, wanted=HEADER_BYTES)
                header = _header_of(image, length)
                wanted = min(file_bytes(header.stored_bytes), len(image))
                return header, self._read_on(fd, image, done=length, wanted=wanted)
            finally:
                self._close(fd)
        except OSError as error:
            if self._direct.refused(error, flag=flag):
                return self._read_file(path, image)
            raise

    def _read_on(self, fd: int, image: memoryview, *, done: int, wanted: int) -> int:
        """Read until at least ``wanted`` bytes are there or the file ends; return how many there are."""
        for _ in range(READS_MAX):
            if done >= wanted:
                break
            # Past the page cache, reading goes on at a page's start only.
            start = done - done % ALIGN_BYTES
            count = self._os.read_into(fd, image[start:], start)
            if start + count <= done:
                break
            done = start + count
        return done

    def _decode(self, header: BlobHeader, buffer: Buffer) -> None:
        """Decode a verified payload in place.

        Raises:
            CorruptError: The stored bytes do not decode; the payload is undefined.
        """
        stored = self._scratch.get(buffer.capacity_bytes).payload(header.stored_bytes)
        stored[:] = buffer.payload(header.stored_bytes)
        codecs.decode_into(
            stored,
            buffer.payload(header.raw_bytes),
            codec=header.codec,
            element_bytes=header.element_bytes,
        )

    def _close(self, fd: int) -> None:
        try:
            self._os.close(fd)
        except OSError:
            return  # Nothing was written: closing can lose nothing.

    def _missed(self, error: OSError, path: str) -> Miss:
        if is_absence(error):
            return Miss(MissReason.ABSENT)
        return Miss(MissReason.IO, str(translate(error, doing="read", path=path)))


def _header_of(image: memoryview, length: int) -> BlobHeader:
    """Decode the header of a file of which ``length`` bytes were read.

    Raises:
        CorruptError: There is no valid header.
    """
    if length < HEADER_BYTES:
        raise CorruptError(MissReason.TORN, f"{length} bytes, a header has {HEADER_BYTES}")
    return decode_header(image[:HEADER_BYTES])
