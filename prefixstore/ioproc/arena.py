"""The arena: staging buffers in memory that the engine's side and the I/O process share.

An anonymous memory file, so that nothing has a name to leak: the kernel frees it with the last
process, however that one dies. Each buffer holds one blob's file image (``prefixstore.tree.buffer``);
the engine's side owns all buffers and lends one with each request, until the reply.
"""

import contextlib
import mmap
import os
from typing import Self

from prefixstore.tree.buffer import Buffer

__all__ = ["Arena"]

MADV_POPULATE_WRITE = 23
"""Linux 5.14; the mmap module has no name for it before Python 3.13."""


class Arena:
    """Buffers of one size in one memory file.

    Safe for concurrent use of different buffers; who may touch one is the protocol's business.

    Attributes:
        fd: The memory file, to be inherited by the child.
        count: The number of buffers.
        payload_bytes: The largest payload that a buffer holds.
    """

    def __init__(self, fd: int, *, count: int, payload_bytes: int) -> None:
        self.fd = fd
        self.count = count
        self.payload_bytes = payload_bytes
        stride = Buffer.image_bytes(payload_bytes)
        self._stride = stride
        self._memory = mmap.mmap(fd, count * stride)
        view = memoryview(self._memory)
        self._buffers = [Buffer.over(view[i * stride : (i + 1) * stride]) for i in range(count)]

    @classmethod
    def create(cls, *, count: int, payload_bytes: int) -> Self:
        """Make a new arena; its pages are not taken from the machine yet."""
        fd = os.memfd_create("prefixstore-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, count * Buffer.image_bytes(payload_bytes))
            return cls(fd, count=count, payload_bytes=payload_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, *, count: int, payload_bytes: int) -> Self:
        """Map the arena that the parent made; takes over ``fd``."""
        return cls(fd, count=count, payload_bytes=payload_bytes)

    def populate(self) -> None:
        """Take all pages from the machine now, buffer by buffer, huge ones where the machine has them.

        Pages taken in order are neighbours in memory as long as that is not in pieces, so that a read
        or write past the page cache is given to the disk in fewer, longer runs; taken one by one as
        threads first use them, they are scattered for good. Whatever the machine refuses comes later,
        page by page.
        """
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):
            for number in range(self.count):
                self._memory.madvise(MADV_POPULATE_WRITE, number * self._stride, self._stride)

    def buffer(self, number: int) -> Buffer:
        """Return one buffer; the caller holds it by the protocol."""
        return self._buffers[number]

    def close(self) -> None:
        """Let go of the file; the mapping goes with the last view of it."""
        self._buffers.clear()
        os.close(self.fd)
