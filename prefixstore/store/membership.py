"""This store's place among the writers of a root, and the file server's time that comes with it.

A store announces itself before its first temporary file, not when it is opened: who only reads leaves no
trace. Touching the announcement tells the server's clock, so from then on recency is counted in the
server's seconds, which all hosts share; until then this host's own clock stands in. Touching and not
writing: some filesystems (GlusterFS, unless its ``ctime`` is off) date what is written by the clock of the
host that writes.
"""

import threading

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.index.records import COUNT_MAX
from prefixstore.tree.root import Root
from prefixstore.tree.writers import REFRESH_S, Reaped, Writers

__all__ = ["Membership"]


class Membership:
    """One writer's membership. Safe for concurrent use; its lock is held while it announces itself."""

    def __init__(self, root: Root, writers: Writers, *, writer: str, clock: Clock) -> None:
        self._root = root
        self._writers = writers
        self._writer = writer
        self._clock = clock
        self._lock = threading.Lock()
        self._announced = False
        self._refresh_at_s = 0.0
        self._ahead_s: float | None = None

    def now_s(self) -> int:
        """Return whole seconds since the epoch by the file server's clock, as far as it is known.

        Once known it goes on with this host's monotonic clock: a wall clock that is set anew must not make
        everything old, nor end pins.
        """
        ahead_s = self._ahead_s
        now_s = self._clock.wall_s() if ahead_s is None else self._clock.monotonic_s() + ahead_s
        return min(max(0, int(now_s)), COUNT_MAX)

    @property
    def knows_time(self) -> bool:
        """Whether the file server's clock is known, and not just this host's."""
        return self._ahead_s is not None

    def announce(self) -> None:
        """Make sure that this writer is known, and that it counts as alive.

        Raises:
            FullError, UnavailableError: The root cannot be written.
        """
        if self._announced and self._clock.monotonic_s() < self._refresh_at_s:
            return
        with self._lock:
            now_s = self._clock.monotonic_s()
            if not self._announced:
                self._writers.register(self._writer)
                self._learn_time()
                self._announced = True
            elif now_s >= self._refresh_at_s:
                self._writers.refresh(self._writer)
                self._learn_time()
            self._refresh_at_s = now_s + REFRESH_S

    def reap(self) -> Reaped:
        """Remove what dead writers left behind.

        Raises:
            FullError, UnavailableError: The root cannot be written or listed.
        """
        self.announce()
        return self._writers.reap(server_now_s=self.now_s(), spare=self._writer)

    def reap_thoroughly(self, *, dry_run: bool) -> Reaped:
        """Look for what the dead left behind in every directory, and remove it or only tell.

        Raises:
            FullError, UnavailableError: The root cannot be written or listed.
        """
        if not dry_run:
            self.announce()
        return self._writers.reap(
            server_now_s=self.now_s(), spare=self._writer, thorough=True, dry_run=dry_run
        )

    def leave(self) -> None:
        """Remove the announcement; what fails is left for others to reap."""
        with self._lock:
            if self._announced:
                self._announced = False
                try:
                    self._writers.leave(self._writer)
                except PrefixStoreError:
                    return

    def _learn_time(self) -> None:
        """Read the server's clock off this writer's file, dated by the server just now."""
        path = self._root.layout.writer(self._writer)
        try:
            self._root.os_calls.touch(path)
            touched = self._root.os_calls.stat(path)
        except OSError:
            return  # This host's clock has to do until the next announcement.
        self._ahead_s = touched.modified_s - self._clock.monotonic_s()
