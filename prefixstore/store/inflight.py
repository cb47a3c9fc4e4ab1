"""Chunks that this process is reading or writing right now, so that it does not evict them meanwhile.

Other processes know nothing of this: for them an unlinked blob is a miss, never wrong bytes. Here it
saves loading a chunk that is being thrown away, and storing one that is about to be.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefixstore.keys import Key, NamespaceId

__all__ = ["InFlight"]


class InFlight:
    """Counts the transfers of each chunk; safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: dict[tuple[NamespaceId, Key], int] = {}

    def __contains__(self, chunk: tuple[NamespaceId, Key]) -> bool:
        return chunk in self._transfers

    def __len__(self) -> int:
        return len(self._transfers)

    @contextmanager
    def hold(self, namespace: NamespaceId, key: Key) -> Iterator[None]:
        """Keep the chunk from this process's eviction while the block runs."""
        chunk = (namespace, key)
        with self._lock:
            self._transfers[chunk] = self._transfers.get(chunk, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                left = self._transfers[chunk] - 1
                if left:
                    self._transfers[chunk] = left
                else:
                    del self._transfers[chunk]
