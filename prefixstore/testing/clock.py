"""A clock that moves only when a test moves it."""

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """Time under the test's control; wall and monotonic time advance together."""

    def __init__(self, *, start_s: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._now_s = start_s

    def wall_s(self) -> float:
        """Return the time that the test has set."""
        return self._now_s

    def monotonic_s(self) -> float:
        """Return the time that the test has set."""
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        """Move the clock instead of waiting."""
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        """Move both times forward."""
        with self._lock:
            self._now_s += duration_s
