"""Whether there is room for one more blob: the quota of the root and the floor of free space.

    0 ........ low .... high .. max_bytes          used bytes, by the index of this host
               ^ evict down to   ^ stores stop here
                        ^ eviction is asked for

Figures are read at most once a second and carried forward by what this process stores meanwhile. What
other hosts store is learnt with each scan of the tree, so the quota can be exceeded by what they store
between two scans; the floor of free space sees everyone's bytes at once.
"""

import threading
from collections.abc import Callable

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.store.values import SkipReason

__all__ = ["Space"]

HIGH_SHARE = 0.95
"""Eviction starts here: the rest is what may be stored while it runs. At 100 GB that is 5 GB, some
seconds of a fast disk; a higher share turns bursts into skipped stores."""
LOW_SHARE = 0.85
"""Eviction ends here: one scan of the tree frees a tenth of the quota. Lower throws away more that
might still be used, higher scans more often."""
REFRESH_S = 1.0
"""How old the figures may be: one index read and one statvfs a second."""


class Space:
    """Room on the root. Safe for concurrent use; its lock is never held around a call to the disk."""

    def __init__(
        self,
        *,
        max_bytes: int | None,
        min_free_bytes: int,
        used_bytes: Callable[[], int],
        free_bytes: Callable[[], int],
        clock: Clock,
    ) -> None:
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._read_used = used_bytes
        self._read_free = free_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._refresh_at_s = float("-inf")
        self._used_bytes = 0
        self._free_bytes = 0

    @property
    def limited(self) -> bool:
        """Whether there is a quota or a floor to keep to."""
        return self._max_bytes is not None or self._min_free_bytes > 0

    def reads_next(self) -> bool:
        """Whether the next question reads the figures anew."""
        return self.limited and self._clock.monotonic_s() >= self._refresh_at_s

    def refusal(self, file_bytes: int) -> SkipReason | None:
        """Return why a blob of ``file_bytes`` must not be stored now, or None."""
        if not self.limited:
            return None
        self._refresh()
        if self._max_bytes is not None and self._used_bytes + file_bytes > self._max_bytes:
            return SkipReason.QUOTA
        if self._min_free_bytes and self._free_bytes - file_bytes < self._min_free_bytes:
            return SkipReason.LOW_SPACE
        return None

    def stored(self, file_bytes: int) -> None:
        """Count a blob that this process has just published."""
        if self.limited:
            with self._lock:
                self._used_bytes += file_bytes
                self._free_bytes -= file_bytes

    def wants_eviction(self) -> bool:
        """Whether so much is stored that it is time to evict."""
        if not self.limited:
            return False
        self._refresh()
        over = self._max_bytes is not None and self._used_bytes > self._max_bytes * HIGH_SHARE
        return over or (self._min_free_bytes > 0 and self._free_bytes < self._min_free_bytes)

    def target_bytes(self, used_bytes: int, *, full: bool) -> int:
        """Return down to which usage to evict.

        Args:
            used_bytes: What the root holds, fresh from a scan.
            full: The filesystem has refused a write, whatever the figures say.
        """
        targets = [used_bytes]
        if self._max_bytes is not None:
            targets.append(int(self._max_bytes * LOW_SHARE))
        if self._min_free_bytes:
            # A tenth beyond the floor, or the next store would ask for eviction again.
            short_bytes = int(self._min_free_bytes * 1.1) - self._free_now()
            targets.append(used_bytes - max(0, short_bytes))
        if full:
            targets.append(int(used_bytes * LOW_SHARE))
        return max(0, min(targets))

    def forget(self) -> None:
        """Read the figures anew at the next question: something was evicted."""
        with self._lock:
            self._refresh_at_s = float("-inf")

    def _refresh(self) -> None:
        now_s = self._clock.monotonic_s()
        with self._lock:
            if now_s < self._refresh_at_s:
                return
            self._refresh_at_s = now_s + REFRESH_S
        used_bytes = self._read_used() if self._max_bytes is not None else 0
        free_bytes = self._free_now() if self._min_free_bytes else 0
        with self._lock:
            self._used_bytes, self._free_bytes = used_bytes, free_bytes

    def _free_now(self) -> int:
        try:
            return self._read_free()
        except (PrefixStoreError, OSError):
            # A root that does not say how much is free is not full for that reason: the write that
            # follows will tell.
            return self._min_free_bytes * 2
