"""Time, passed in so that tests can own it; the only module that reads a clock.

``wall_s`` is this host's idea of the date and is never compared with a time that another host or a
file server wrote. ``monotonic_s`` measures waits and deadlines within this process.
"""

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """What the rest of prefixstore asks of a clock."""

    def wall_s(self) -> float:
        """Return seconds since the epoch, by this host."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds since some fixed point; never goes back."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Wait ``duration_s`` seconds."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_s(self) -> float:
        """Return seconds since the epoch, by this host."""
        return time.time()

    def monotonic_s(self) -> float:
        """Return seconds since boot."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Wait ``duration_s`` seconds."""
        time.sleep(duration_s)
