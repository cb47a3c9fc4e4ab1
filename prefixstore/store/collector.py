"""The long work in the background: rebuild a fresh index, evict when the root fills up, reap orphans.

One thread, started with the first request, takes one request at a time; a request made twice while it
waits is one. It ends between two directories, or two victims, when the store closes. Now and then it asks
itself whether something is due that no store asks for: the root is above its high watermark though nobody
stores, or its limits name an age, and nobody has scanned it for long.

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
from prefixstore.store.values import EvictionReport
from prefixstore.tree.lease import BEAT_S, Lease

__all__ = ["Collector"]

LOG = logging.getLogger(__name__)

BREATH_S = 0.02
BREATH_MAX_S = 1.0
"""A rebuild rests as long as it worked, at most a second, so that a million blobs cost a starting engine
half of one core for a minute and not all of it for half a minute."""
QUIET_S = 30.0
"""After an eviction that freed nothing (all is pinned, or the root cannot be written) the next one has
to wait so long: each costs a scan of the tree. So has one that a namespace's own limit asks for, after it
could not give what it should."""
LOOK_S = 5.0
"""How often the collector asks itself whether something is due: some stats each time."""
PASS_S = 600.0
PASS_MAX_S = 3600.0
"""Of the hosts of a root with an age limit, or limits of namespaces, one makes a pass over it so often; with
an age of days every hour, which is a tenth of what chunks then get older than they may. A host whose
passes nobody hears of, since a directory cannot be read or the root is full, makes them no more often."""


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
        self._own_limits_at_s = float("-inf")
        self._passed_at_s = float("-inf")
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
        now_s = self._clock.monotonic_s()
        if now_s < self._evict_at_s:
            return
        if now_s >= self._own_limits_at_s or full or self._parts.space.wants_eviction(whole=True):
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

    def look(self) -> None:
        """Ask for what is due by the limits, though nobody has stored anything."""
        limits = self._parts.limits.known()
        if self._parts.config.read_only or not limits.any:
            return
        if self._parts.space.wants_eviction():
            self.want_eviction()
        elif limits.max_age_s is not None or limits.namespaces:
            self._parts.usage.exchange()
            wait_s = PASS_S
            if limits.max_age_s is not None:
                wait_s = min(PASS_MAX_S, max(PASS_S, limits.max_age_s / 10))
            now_s = self._clock.monotonic_s()
            age_s = min(self._parts.usage.scan_age_s, now_s - self._passed_at_s)
            if age_s >= wait_s and now_s >= self._evict_at_s:
                self._want("pass")

    def make_pass(
        self, *, stop: Callable[[], bool], target_bytes: int | None, max_age_s: float | None
    ) -> EvictionReport | None:
        """Look over the whole root once, in the caller's thread: orphans go, and what the limits say.

        Args:
            stop: Asked at each directory and batch; it may wait, to spare the disk.
            target_bytes: Down to which usage to evict; None for the root's limits.
            max_age_s: What is older goes, too; None for the root's limit.

        Returns:
            What went; None while another host evicts.

        Raises:
            PrefixStoreError: The root cannot be read.
        """
        try:
            self._reap()
        except PrefixStoreError as error:
            # A root that is full, or cannot be written, is evicted from all the same, or says so then.
            LOG.info("prefixstore cannot reap: %s", error)
        return self._with_lease(
            lambda has_ended: self._evict_until(
                lambda: stop() or has_ended(),
                urgent=False,
                target_bytes=target_bytes,
                max_age_s=max_age_s,
            )
        )

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
            self._wake.wait(LOOK_S)
            self._wake.clear()
            self._look_safely()
            self.work()
        self._idle.set()

    def _next(self) -> str | None:
        """Take the most urgent request; None when there is none left, or no time."""
        with self._lock:
            if self._closing:
                return None
            for what in ("evict", "pass", "rebuild", "reap"):
                if what in self._wanted:
                    self._wanted.discard(what)
                    return what
            self._idle.set()
            return None

    def _do(self, what: str) -> None:
        parts = self._parts
        try:
            if what in ("evict", "pass"):
                urgent = what == "evict"
                self._with_lease(lambda ended: self._evict_until(ended, urgent=urgent))
            elif what == "rebuild":
                self._breath_s = self._clock.monotonic_s()
                report = self._evictor.reconcile(stop=self._breathe, resume=True)
                if report.finished and report.resumed and parts.limits.known().bounded:
                    # The index is complete; what the root holds takes a scan of the whole.
                    self.want_rebuild()
            else:
                self._reap()
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

    def _reap(self) -> None:
        """Remove what dead writers left behind, and what nobody asks for any more; each for itself.

        Raises:
            PrefixStoreError: The root cannot be written, or the first of what failed once all is tried.
        """
        parts = self._parts
        # What is old is told by the file server's clock.
        parts.membership.announce()
        failures: list[PrefixStoreError] = []
        for step in (
            self._reap_orphans,
            lambda: parts.usage.forget_old(server_now_s=parts.membership.now_s()),
            lambda: forget_old_history(parts.root, server_now_s=parts.membership.now_s()),
        ):
            try:
                step()
            except PrefixStoreError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _reap_orphans(self) -> None:
        reaped = self._parts.membership.reap()
        self._parts.counters.add(orphans_removed=reaped.files)
        if reaped.unread:
            count, first = len(reaped.unread), reaped.unread[0]
            LOG.warning("prefixstore looks for orphans but in %d directories: %s", count, first)

    def _look_safely(self) -> None:
        try:
            self.look()
        except ClosedError:
            return
        except Exception:
            LOG.exception("prefixstore failed to see what is due")
            self._parts.counters.add(background_failures=1)

    def _with_lease(
        self, evict: Callable[[Callable[[], bool]], EvictionReport]
    ) -> EvictionReport | None:
        """Evict while this host has the lease, or nobody can have it; None if another host has it."""
        has_lease = True
        try:
            if not self._lease.acquire():
                self._parts.counters.add(evictions_left=1)
                # Another host is at it: its scan is as good as one of this host's, what it frees shows in
                # the figures once they are read anew, and whether the disk is full in the next write.
                self._full = False
                self._passed_at_s = self._clock.monotonic_s()
                self._evict_at_s = self._clock.monotonic_s() + BEAT_S
                return None
        except PrefixStoreError as error:
            has_lease = False
            LOG.info("prefixstore evicts without the lease: %s", error)
        try:
            return evict(lambda: self._closing or (has_lease and not self._lease.renew()))
        finally:
            self._lease.release()

    def _evict_until(
        self,
        stop: Callable[[], bool],
        *,
        urgent: bool,
        target_bytes: int | None = None,
        max_age_s: float | None = None,
    ) -> EvictionReport:
        parts = self._parts
        full = urgent and self._full
        if urgent:
            self._full = False

        def target(used_bytes: int) -> int:
            if target_bytes is not None:
                return target_bytes
            return parts.space.target_bytes(used_bytes, full=full, urgent=urgent)

        try:
            report = self._evictor.evict(
                target,
                namespace_bytes=parts.space.namespace_targets,
                max_age_s=parts.limits.known().max_age_s if max_age_s is None else max_age_s,
                dry_run=False,
                scan=True,
                stop=stop,
            )
        finally:
            self._passed_at_s = self._clock.monotonic_s()
        parts.space.forget()
        parts.counters.add(evictions=1)
        for error in report.errors:
            LOG.warning("prefixstore eviction: %s", error)
        if report.evicted_chunks:
            parts.breaker.retry_soon()
        elif urgent:
            self._evict_at_s = self._clock.monotonic_s() + QUIET_S
        if report.short_bytes:
            self._own_limits_at_s = self._clock.monotonic_s() + QUIET_S
        return report
