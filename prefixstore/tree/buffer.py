"""Buffers: page-aligned staging memory that holds one blob exactly as its file does.

    header page | payload | zeros up to a page | one page to spare

So a raw blob is one read into a buffer or one write from it, past the page cache where the root allows
that, and its payload lies at a fixed place. The spare page tells a file that is too long in the same
read.
"""

import mmap
import threading
from typing import Self

from prefixstore.blob.header import ALIGN_BYTES, HEADER_BYTES, file_bytes

__all__ = ["Buffer", "ThreadBuffer"]


class Buffer:
    """Room for one blob. Not thread-safe: one owner at a time.

    Attributes:
        image: All of the memory.
        capacity_bytes: The largest payload that fits.
    """

    __slots__ = ("capacity_bytes", "image")

    def __init__(self, image: memoryview) -> None:
        self.image = image
        self.capacity_bytes = len(image) - HEADER_BYTES - ALIGN_BYTES

    @staticmethod
    def image_bytes(payload_bytes: int) -> int:
        """Return the memory that a buffer for ``payload_bytes`` takes."""
        return file_bytes(payload_bytes) + ALIGN_BYTES

    @classmethod
    def allocate(cls, payload_bytes: int) -> Self:
        """Make a buffer in anonymous memory; its pages are taken when they are first used."""
        return cls(memoryview(mmap.mmap(-1, cls.image_bytes(payload_bytes))))

    @classmethod
    def over(cls, memory: memoryview) -> Self:
        """Make a buffer of given memory: page-aligned, writable, of ``image_bytes`` in length."""
        assert memory.nbytes % ALIGN_BYTES == 0, f"{memory.nbytes} bytes are no whole pages"
        return cls(memory.cast("B"))

    def payload(self, length: int) -> memoryview:
        """Return the first ``length`` bytes of the payload; a view, valid as long as the buffer."""
        assert length <= self.capacity_bytes, f"{length} bytes, {self.capacity_bytes} fit"
        return self.image[HEADER_BYTES : HEADER_BYTES + length]


class ThreadBuffer:
    """One buffer for each thread that asks, grown to the largest payload it asked for, then reused."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, payload_bytes: int) -> Buffer:
        """Return the calling thread's buffer, with room for ``payload_bytes``; its content is stale."""
        buffer: Buffer | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.capacity_bytes < payload_bytes:
            buffer = Buffer.allocate(payload_bytes)
            self._local.buffer = buffer
        return buffer
