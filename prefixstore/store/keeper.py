"""What need not happen while a request waits: rows and recency in the index, times on disk.

One background thread takes what the callers left behind, twice a second or as soon as there is much:

    learnt(entries) -> rows in the index, many in one transaction: 1-2 us each instead of 100
    used(keys)      -> recency in the index, then a touch on disk for the blobs that are due for one

and has the writers of a root with a quota tell each other what they have stored
(``prefixstore.store.usage``), and writes down what was counted (``prefixstore.store.history``).

All of it is a hint, so all of it is bounded: when the thread cannot keep up (a hung mount stops its
touches) the oldest work is dropped. A dropped touch makes a chunk look older than it is; a dropped row
costs a probe later.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence

from prefixstore.errors import ClosedError, PrefixStoreError
from prefixstore.index.base import Entry
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.history import Recorder
from prefixstore.store.parts import Parts

__all__ = ["Keeper"]

LOG = logging.getLogger(__name__)

TICK_S = 0.5
"""How long recency may lag behind; eviction flushes first, so it never sees the lag."""
WAKE_ROWS = 256
WAKE_KEYS = 4096
"""So much work wakes the thread early: the cost of a transaction is then shared by enough rows."""
PENDING_MAX = 2**17
"""Keys that wait for the index, and keys that wait for the disk: some 10 MB each when full."""
SLICE_KEYS = 512
"""Keys in one index call of the thread: a millisecond or two between which lookups get their turn."""
TOUCHES_A_ROUND = 256
"""Touches on disk before the thread looks at the index's work again: 0.1 s on a slow shared filesystem."""


class Keeper:
    """The background thread of one store. Safe for concurrent use.

    Lock order: ``_flushing`` before ``_lock``; ``_lock`` is a leaf, held for list operations only.
    """

    def __init__(self, parts: Parts, *, namespace: NamespaceId) -> None:
        self._namespace = namespace
        self._tree = parts.tree
        self._hints = parts.hints
        self._membership = parts.membership
        self._counters = parts.counters
        self._usage = parts.usage
        self._space = parts.space
        self._recorder = Recorder(
            parts.root,
            parts.counters,
            writer=parts.tree.writer,
            namespace=namespace,
            enabled=not parts.config.read_only,
            clock=parts.clock,
            now_s=parts.membership.now_s,
        )
        self._background = parts.background
        # A store that only serves leaves the times on disk to others.
        self._refresh_s = None if parts.config.read_only else int(parts.config.touch_interval_s)
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._used: dict[Key, None] = {}
        self._learnt: deque[Entry] = deque(maxlen=PENDING_MAX)
        self._due: deque[Key] = deque(maxlen=PENDING_MAX)

    def used(self, keys: Sequence[Key]) -> None:
        """Note that ``keys`` were of use just now."""
        with self._lock:
            self._used.update(dict.fromkeys(keys))
            self._start()
            many = len(self._used) >= WAKE_KEYS
            while len(self._used) > PENDING_MAX:
                del self._used[next(iter(self._used))]
        if many:
            self._wake.set()

    def learnt(self, entries: Sequence[Entry]) -> None:
        """Note chunks that are there: published or found."""
        with self._lock:
            self._learnt.extend(entries)
            self._start()
            many = len(self._learnt) >= WAKE_ROWS
        if many:
            self._wake.set()

    def flush(self) -> None:
        """Write what waits for the index now, in the caller's thread."""
        with self._flushing:
            with self._lock:
                used, self._used = list(self._used), {}
                entries = list(self._learnt)
                self._learnt.clear()
            for at in range(0, len(entries), SLICE_KEYS):
                self._hints.put_many(entries[at : at + SLICE_KEYS])
            now_s = self._membership.now_s()
            # Children before parents: if this stops half way, what looks old is needed by something
            # that looks new, and stays.
            used.reverse()
            for at in range(0, len(used), SLICE_KEYS):
                due = self._hints.touch_many(
                    self._namespace,
                    used[at : at + SLICE_KEYS],
                    used_s=now_s,
                    refresh_s=self._refresh_s,
                )
                if due:
                    self._due.extend(due)

    def work(self) -> None:
        """Do all that waits now, in the caller's thread."""
        self._learn_time()
        self.flush()
        self._usage.exchange(step_bytes=self._space.step_bytes)
        self._recorder.record()
        while self._due and not self._closing:
            self._touch_due()

    def close(self, *, timeout_s: float) -> bool:
        """Flush, end the thread and wait for it for a bounded time; return whether it has ended."""
        self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        self.flush()
        self._usage.exchange(step_bytes=1)
        self._recorder.record(at_once=True)
        return thread is None or not thread.is_alive()

    def _start(self) -> None:
        """Start the thread with the first work; the caller holds ``_lock``."""
        if self._thread is None and self._background and not self._closing:
            self._thread = threading.Thread(
                target=self._run, name="prefixstore-keeper", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            if not self._due:
                self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self._learn_time()
                self.flush()
                self._usage.exchange(step_bytes=self._space.step_bytes)
                self._recorder.record()
                self._touch_due()
            except ClosedError:
                return  # Closed under its feet, when a hung mount has outlasted the close.
            except Exception:
                # A bug of ours must not end recency for good: it is told, counted and survived.
                LOG.exception("prefixstore failed to keep its index")
                self._counters.add(background_failures=1)

    def _learn_time(self) -> None:
        """See that recency is counted in the server's seconds from the first one on.

        Noted by a clock that is days ahead, a touch on disk would be the last one for days.
        """
        if self._used and self._refresh_s is not None:
            # Else this host's clock has to do.
            with contextlib.suppress(PrefixStoreError):
                self._membership.announce()

    def _touch_due(self) -> None:
        for _ in range(min(TOUCHES_A_ROUND, len(self._due))):
            if self._closing:
                return
            try:
                touched = self._tree.touch(self._namespace, self._due.popleft())
            except PrefixStoreError:
                # The file of another user, or a root that cannot be written: recency of other hosts
                # suffers, nothing else.
                self._counters.add(touches_failed=1)
            else:
                self._counters.add(touches=int(touched))
