"""A breaker: after a failure, pause; then let one caller try; pause longer while it keeps failing.

    closed --failed()--> open for pause_s --time--> one trial --failed()--> open for 2 x pause_s, ...
                                                          `--succeeded()--> closed

A full disk or an unreachable root costs one failed write per pause, not one per chunk.
"""

import threading

from prefixstore.clock import Clock

__all__ = ["Breaker"]


class Breaker:
    """Decides whether an operation that failed before is worth a try; safe for concurrent use."""

    def __init__(self, *, pause_s: float, pause_max_s: float, clock: Clock) -> None:
        self._pause_first_s = pause_s
        self._pause_max_s = pause_max_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._try_at_s = 0.0
        self._on_trial = False

    @property
    def is_open(self) -> bool:
        """Whether the last attempt failed and none has succeeded since."""
        return self._pause_s > 0

    def allows(self) -> bool:
        """Return True if an attempt may be made now.

        While open, one caller per pause gets True: its attempt is the trial, so a second caller has
        to wait for the outcome or for the pause to pass again.
        """
        if not self._pause_s:
            return True
        now_s = self._clock.monotonic_s()
        with self._lock:
            if not self._pause_s:
                return True
            if now_s < self._try_at_s:
                return False
            self._try_at_s = now_s + self._pause_s
            self._on_trial = True
            return True

    def failed(self) -> None:
        """Record a failed attempt: pause, twice as long as before, up to the maximum."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            # Attempts that were under way when the breaker opened fail, too: only a trial's failure
            # doubles the pause.
            if self._pause_s and not self._on_trial:
                return
            self._on_trial = False
            self._pause_s = min(self._pause_max_s, max(self._pause_first_s, 2 * self._pause_s))
            self._try_at_s = now_s + self._pause_s

    def succeeded(self) -> None:
        """Record a successful attempt: close the breaker."""
        if self._pause_s:
            with self._lock:
                self._pause_s = 0.0
                self._on_trial = False

    def retry_soon(self) -> None:
        """Allow a trial at once: something was freed or mended."""
        with self._lock:
            self._try_at_s = self._clock.monotonic_s()
