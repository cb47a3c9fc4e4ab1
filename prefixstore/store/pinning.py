"""Pins as the store keeps them: the files are the truth, counts in memory and in the index follow.

A pin may name chunks that are not stored yet: its count waits for them. A pin with an end holds nothing
after it; its file is removed by the next eviction of any host.
"""

import contextlib
import threading

from prefixstore.errors import PrefixStoreError
from prefixstore.index.base import Address
from prefixstore.tree.pins import Pin, Pins, pinned_keys
from prefixstore.tree.root import Root

__all__ = ["PinBook"]

Signature = tuple[tuple[str, int, float, int], ...]


class PinBook:
    """What all pins of a root hold, read again only when a pin file changed. Safe for concurrent use."""

    def __init__(self, root: Root) -> None:
        self.files = Pins(root)
        self._root = root
        self._lock = threading.Lock()
        self._signature: Signature | None = None
        self._pins: tuple[Pin, ...] = ()
        self._counts: dict[Address, int] = {}
        self._counted_at_s = 0
        self._counts_end_s = 0.0

    def held(self, *, now_s: int) -> dict[Address, int]:
        """Count for each pinned key how many pins hold it; do not change the result.

        Raises:
            InvalidError: A pin's file is damaged: what it held must not be guessed.
            UnavailableError: The pins cannot be read.
        """
        with self._lock:
            signature = self._read_signature()
            if signature != self._signature:
                # A file that changes between the two readings changes the signature again.
                self._pins = tuple(self.files)
                self._signature = signature
            elif self._counted_at_s <= now_s < self._counts_end_s:
                # Time goes back when a host whose clock is ahead learns the server's.
                return self._counts
            ends = [pin.ends_at_s for pin in self._pins if pin.ends_at_s is not None]
            self._counts = pinned_keys(self._pins, now_s=now_s)
            self._counted_at_s = now_s
            self._counts_end_s = min((end for end in ends if end > now_s), default=float("inf"))
            return self._counts

    def remove_ended(self, *, now_s: int) -> int:
        """Remove the files of pins that have ended, put back what a killed host has moved aside.

        Returns how many were removed; what cannot be removed holds nothing, either.
        """
        removed = 0
        for pin in self._pins:
            with contextlib.suppress(PrefixStoreError):
                if pin.holds(now_s):
                    self.files.put_back(pin)
                # Someone may have given the name to a new pin meanwhile.
                elif self.files.read(pin.name) == pin:
                    removed += self.files.remove_ended(pin)
        return removed

    def _read_signature(self) -> Signature:
        """Return what tells that a pin file was added, replaced or removed."""
        found = []
        for name in self.files.names():
            with contextlib.suppress(OSError):  # Removed meanwhile: the next look tells.
                stat = self._root.os_calls.stat(self._root.layout.pin(name))
                found.append((name, stat.inode, stat.modified_s, stat.size_bytes))
        return tuple(found)
