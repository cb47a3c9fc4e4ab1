"""The staging ring: a fixed number of equal buffers, lent and given back, never waited for."""

import threading

from prefixstore.vllm.direct.device import Staging

__all__ = ["Lease", "StagingRing"]

ALIGNMENT_BYTES = 4096


class Lease:
    """One buffer while it is lent out.

    Attributes:
        address: Where it begins.
    """

    def __init__(self, ring: "StagingRing", number: int, address: int) -> None:
        self._ring = ring
        self._number: int | None = number
        self.address = address

    def release(self) -> None:
        """Give the buffer back; again is harmless. From any thread."""
        with self._ring.lock:
            if self._number is not None:
                self._ring.free.append(self._number)
                self._number = None


class StagingRing:
    """Buffers cut from one piece of staging memory. Safe for concurrent use.

    Attributes:
        count: How many buffers there are.
    """

    def __init__(self, memory: Staging, *, payload_bytes: int) -> None:
        self._memory = memory
        self._stride = stride_bytes(payload_bytes)
        self.count = memory.length // self._stride
        self.lock = threading.Lock()
        self.free = list(range(self.count))

    def acquire(self, *, leave: int = 0) -> Lease | None:
        """Lend a buffer, unless no more than ``leave`` are free."""
        with self.lock:
            if len(self.free) <= leave:
                return None
            number = self.free.pop()
        return Lease(self, number, self._memory.address + number * self._stride)


def stride_bytes(payload_bytes: int) -> int:
    """Return what one buffer takes: page-aligned, so that a device copies whole pages."""
    return -(-payload_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
