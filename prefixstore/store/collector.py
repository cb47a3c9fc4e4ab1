"""The long work in the background: rebuild a fresh index, evict when the root fills up, reap orphans.

One thread, started with the first request, takes one request at a time; a request made twice while it
waits is one. It ends between two directories, or two victims, when the store closes.

Of several hosts at their quota one evicts, the one that has the lease (``prefixstore.tree.lease``); the
others ask again until it has made room. A root on which no lease can be had, full or broken, is evicted
from all the same.
"""

import logging
import threading
from collections.abc import Callable

from prefixstore.errors import ClosedError, PrefixStoreError
from prefixstore.store.evictor import Evictor
from prefixstore.store.history import forget_old_history
from prefixstore.store.parts import Parts
from prefixstore.tree.lease import BEAT_S, Lease

__all__ = ["Collector"]

LOG = logging.getLogger(__name__)

BREATH_S = 0.02
BREATH_MAX_S = 1.0
"""A rebuild rests as long as it worked, at most a second, so that a million blobs cost a starting engine
half of one core for a minute and not all of it for half a minute."""
QUIET_S = 30.0
"""After an eviction that freed nothing (all is pinned, or the root cannot be written) the next one has
to wait so long: each costs a scan of the tree."""


class Collector:
    """The background thread for long work. Safe for concurrent use; its lock is a leaf."""

    def __init__(self, parts: Parts, evictor: Evictor) -> None:
        self._parts = parts
        self._evictor = evictor
        self._lease = Lease(parts.root, holder=parts.tree.writer, clock=parts.clock)
        self._clock = parts.clock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._wanted: set[str] = set()
        self._full = False
        self._evict_at_s = float("-inf")
        self._closing = False
        self._closed = threading.Event()
        self._breath_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def closing(self) -> bool:
        """Whether long work should end at its next step."""
        return self._closing

    def want_rebuild(self) -> None:
        """Ask for a scan that brings the index in line with the tree."""
        self._want("rebuild")

    def want_reap(self) -> None:
        """Ask for the removal of what dead writers left behind."""
        self._want("reap")

    def want_eviction(self, *, full: bool = False) -> None:
        """Ask for an eviction.

        Args:
            full: The filesystem has refused a write: evict whatever the figures say.
        """
        if self._clock.monotonic_s() >= self._evict_at_s:
            self._full = self._full or full
            self._want("evict")

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is asked for or under way; return whether that came to pass."""
        return self._idle.wait(timeout_s)

    def work(self) -> None:
        """Do all that is asked for now, in the caller's thread."""
        while (what := self._next()) is not None:
            self._do(what)

    def close(self, *, timeout_s: float) -> bool:
        """End the thread at its next step and wait for it; return whether it has ended."""
        self._closing = True
        self._closed.set()
        self._wake.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _want(self, what: str) -> None:
        with self._lock:
            if self._closing or what in self._wanted:
                return
            self._wanted.add(what)
            self._idle.clear()
            if self._thread is None and self._parts.background:
                self._thread = threading.Thread(
                    target=self._run, name="prefixstore-collector", daemon=True
                )
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            self.work()
        self._idle.set()

    def _next(self) -> str | None:
        """Take the most urgent request; None when there is none left, or no time."""
        with self._lock:
            if self._closing:
                return None
            for what in ("evict", "rebuild", "reap"):
                if what in self._wanted:
                    self._wanted.discard(what)
                    return what
            self._idle.set()
            return None

    def _do(self, what: str) -> None:
        parts = self._parts
        try:
            if what == "evict":
                self._evict()
            elif what == "rebuild":
                self._breath_s = self._clock.monotonic_s()
                self._evictor.reconcile(stop=self._breathe)
            else:
                parts.counters.add(orphans_removed=parts.membership.reap())
                parts.usage.forget_old(server_now_s=parts.membership.now_s())
                forget_old_history(parts.root, server_now_s=parts.membership.now_s())
        except ClosedError:
            return  # Closed under its feet, when a hung mount has outlasted the close.
        except PrefixStoreError as error:
            LOG.warning("prefixstore cannot %s: %s", what, error)
        except Exception:
            # A bug of ours must not end eviction for good: it is told, counted and survived.
            LOG.exception("prefixstore failed to %s", what)
            parts.counters.add(background_failures=1)

    def _breathe(self) -> bool:
        """Let loads have the interpreter and the disk between two directories of a rebuild.

        Returns whether to stop.
        """
        worked_s = self._clock.monotonic_s() - self._breath_s
        if self._parts.background and worked_s >= BREATH_S:
            self._closed.wait(min(worked_s, BREATH_MAX_S))
            self._breath_s = self._clock.monotonic_s()
        return self._closing

    def _evict(self) -> None:
        has_lease = True
        try:
            if not self._lease.acquire():
                self._parts.counters.add(evictions_left=1)
                # Another host is at it; what it frees shows in the figures once they are read anew.
                self._evict_at_s = self._clock.monotonic_s() + BEAT_S
                return
        except PrefixStoreError as error:
            has_lease = False
            LOG.info("prefixstore evicts without the lease: %s", error)
        try:
            self._evict_until(lambda: self._closing or (has_lease and not self._lease.renew()))
        finally:
            self._lease.release()

    def _evict_until(self, stop: Callable[[], bool]) -> None:
        parts = self._parts
        full, self._full = self._full, False
        report = self._evictor.evict(
            lambda used_bytes: parts.space.target_bytes(used_bytes, full=full),
            max_age_s=None,
            dry_run=False,
            scan=True,
            stop=stop,
        )
        parts.space.forget()
        parts.counters.add(evictions=1)
        for error in report.errors:
            LOG.warning("prefixstore eviction: %s", error)
        if report.evicted_chunks:
            parts.breaker.retry_soon()
        else:
            self._evict_at_s = self._clock.monotonic_s() + QUIET_S
