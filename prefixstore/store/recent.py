"""Keys that were seen a moment ago, missing or present, so that nobody looks twice in a row.

Missing ones, so that a long miss is paid once and not at every step; present ones, so that a chain's
end is not looked at again and again. What was seen is believed for ``ttl_s`` and no longer: another host
may publish or evict the chunk meanwhile, and this memory is what delays finding out. The map is bounded;
when full the oldest key is forgotten, which costs one probe.
"""

import threading
from collections.abc import Iterable

from prefixstore.clock import Clock
from prefixstore.keys import Key

__all__ = ["RecentKeys"]


class RecentKeys:
    """A bounded set of keys with an age; safe for concurrent use."""

    def __init__(self, *, ttl_s: float, keys_max: int, clock: Clock) -> None:
        self._ttl_s = ttl_s
        self._keys_max = keys_max
        self._clock = clock
        self._lock = threading.Lock()
        # A dict keeps insertion order and every entry has the same lifetime, so the first entries
        # are always the next to expire.
        self._forget_at_s: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._forget_at_s)

    def add(self, key: Key) -> None:
        """Remember ``key`` from now on."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._forget_at_s.pop(key, None)
            self._forget_at_s[key] = now_s + self._ttl_s
            while len(self._forget_at_s) > self._keys_max:
                del self._forget_at_s[next(iter(self._forget_at_s))]

    def forget(self, keys: Iterable[Key]) -> None:
        """Forget ``keys``: the opposite is known now."""
        with self._lock:
            for key in keys:
                self._forget_at_s.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._forget_at_s.clear()

    def __contains__(self, key: Key) -> bool:
        forget_at_s = self._forget_at_s.get(key)
        return forget_at_s is not None and forget_at_s > self._clock.monotonic_s()
