"""Whether there is room for one more blob: the limits of the root and what is known of its usage.

    0 ........ low .... high .. max_bytes          used bytes (``prefixstore.store.usage``)
               ^ evict down to   ^ stores stop here, a slack earlier where several writers store
                        ^ eviction is asked for

What other writers store is heard late: each tells after a **step** of bytes, and asks the others after a
step of its own. So when the first of n writers learns that the root is full, each of the others may have
stored a step that it has not told and another before it asks: the slack is 2 n steps, and the step is
small where the quota is, or near. The root then holds no more than ``max_bytes`` and what is in flight, but
for what the mount caches of others' accounts. The floor of free space sees everyone's bytes at once.
"""

import threading
from collections.abc import Callable

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.store.limits import Limits, LimitsBook
from prefixstore.store.usage import STEP_BYTES, Usage
from prefixstore.store.values import SkipReason

__all__ = ["HIGH_SHARE", "LOW_SHARE", "Space"]

HIGH_SHARE = 0.95
"""Eviction starts here: the rest is what may be stored while it runs. At 100 GB that is 5 GB, some
seconds of a fast disk; a higher share turns bursts into skipped stores."""
LOW_SHARE = 0.85
"""Eviction ends here: one scan of the tree frees a tenth of the quota. Lower throws away more that
might still be used, higher scans more often."""
SLACK_SHARE = 0.025
"""Of the quota, kept free for what several writers have not told each other yet: half of what lies above
the high watermark, so that eviction has always begun by then."""
FAR_SHARE = 0.05
"""Below the low watermark writers may tell each other later: so much of the quota, shared among them."""
REFRESH_S = 1.0
FAR_REFRESH_S = 5.0
"""How old the figures may be near the quota, and below the low watermark. A refresh lists ``collector/`` and
costs a stat for each account there."""


class Space:
    """Room on the root. Safe for concurrent use.

    ``_refreshing`` is held around a refresh's I/O: who needs newer figures waits for them. ``_lock`` comes
    after it and is held for arithmetic only.
    """

    def __init__(
        self,
        *,
        limits: LimitsBook,
        usage: Usage,
        indexed_bytes: Callable[[], dict[NamespaceId, int]],
        free_bytes: Callable[[], int],
        clock: Clock,
    ) -> None:
        """Build it.

        Args:
            limits: What to keep to.
            usage: What the root holds.
            indexed_bytes: What this host's index knows, by namespace, for as long as nobody has scanned.
            free_bytes: Asks the filesystem.
            clock: For how old the figures are.
        """
        self._limits = limits
        self._usage = usage
        self._read_indexed = indexed_bytes
        self._read_free = free_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._refresh_at_s = float("-inf")
        self._since_refresh_bytes = 0
        self._step_bytes = STEP_BYTES
        self._slack_share = 0.0
        self._used: dict[NamespaceId, int] = {}
        self._free_bytes = 0

    @property
    def limited(self) -> bool:
        """Whether there is a limit to keep to."""
        return self._limits.known().any

    @property
    def step_bytes(self) -> int:
        """After how many bytes a writer tells the others."""
        return self._step_bytes

    def reads_next(self) -> bool:
        """Whether the next question reads the figures anew."""
        return self.limited and self._is_due()

    def refusal(self, file_bytes: int, *, namespace: NamespaceId) -> tuple[SkipReason, str] | None:
        """Return why a blob of ``file_bytes`` must not be stored now, with a sentence, or None."""
        try:
            limits = self._limits.current()
        except PrefixStoreError as error:
            return SkipReason.LIMITS, str(error)
        if not limits.any:
            return None
        self._refresh()
        with self._lock:
            used, used_bytes = self._used.get(namespace, 0), sum(self._used.values())
            free_bytes, keeps = self._free_bytes, 1 - self._slack_share
        if limits.max_bytes is not None and used_bytes + file_bytes > limits.max_bytes * keeps:
            return SkipReason.QUOTA, ""
        own_bytes = limits.namespaces.get(namespace)
        if own_bytes is not None and used + file_bytes > own_bytes * keeps:
            return SkipReason.QUOTA, ""
        if limits.min_free_bytes and free_bytes - file_bytes < limits.min_free_bytes:
            return SkipReason.LOW_SPACE, ""
        return None

    def stored(self, namespace: NamespaceId, file_bytes: int) -> None:
        """Count a blob that this process has just published."""
        with self._lock:
            self._used[namespace] = self._used.get(namespace, 0) + file_bytes
            self._free_bytes -= file_bytes
            self._since_refresh_bytes += file_bytes

    def wants_eviction(self, *, whole: bool = False) -> bool:
        """Whether so much is stored that it is time to evict; with ``whole``, by the limits of the root alone."""
        limits = self._limits.known()
        if not limits.any:
            return False
        self._refresh()
        with self._lock:
            used, free_bytes = dict(self._used), self._free_bytes
        if limits.max_bytes is not None and sum(used.values()) > limits.max_bytes * HIGH_SHARE:
            return True
        if limits.min_free_bytes and free_bytes < limits.min_free_bytes:
            return True
        return not whole and any(
            used.get(namespace, 0) > own_bytes * HIGH_SHARE
            for namespace, own_bytes in limits.namespaces.items()
        )

    def target_bytes(self, used_bytes: int, *, full: bool, urgent: bool = True) -> int:
        """Return down to which usage to evict.

        Args:
            used_bytes: What the root holds, fresh from a scan.
            full: The filesystem has refused a write, whatever the figures say.
            urgent: Evict down to the low watermark from wherever; False only from above the high one.
        """
        limits = self._limits.known()
        targets = [used_bytes]
        if limits.max_bytes is not None and (urgent or used_bytes > limits.max_bytes * HIGH_SHARE):
            targets.append(int(limits.max_bytes * LOW_SHARE))
        if limits.min_free_bytes:
            # A tenth beyond the floor, or the next store would ask for eviction again.
            free_bytes = self._free_now(limits.min_free_bytes)
            short_bytes = int(limits.min_free_bytes * 1.1) - free_bytes
            if urgent or free_bytes < limits.min_free_bytes:
                targets.append(used_bytes - max(0, short_bytes))
        if full:
            targets.append(int(used_bytes * LOW_SHARE))
        return max(0, min(targets))

    def namespace_targets(self, used: dict[NamespaceId, int]) -> dict[NamespaceId, int]:
        """Return how many bytes namespaces above their own limit's high watermark have to give."""
        return {
            namespace: used[namespace] - int(own_bytes * LOW_SHARE)
            for namespace, own_bytes in self._limits.known().namespaces.items()
            if used.get(namespace, 0) > own_bytes * HIGH_SHARE
        }

    def forget(self) -> None:
        """Read the figures anew at the next question: something was evicted."""
        with self._lock:
            self._refresh_at_s = float("-inf")

    def _is_due(self) -> bool:
        with self._lock:
            return (
                self._clock.monotonic_s() >= self._refresh_at_s
                or self._since_refresh_bytes >= self._step_bytes
            )

    def _refresh(self) -> None:
        if not self._is_due():
            return
        with self._refreshing:
            if not self._is_due():
                return  # Another thread has just done it.
            limits = self._limits.known()
            with self._lock:
                seen_bytes = self._since_refresh_bytes
            used: dict[NamespaceId, int] = {}
            if limits.bounded:
                self._usage.exchange(step_bytes=self._step_bytes, hear=True)
                known = self._usage.used_bytes()
                used = self._read_indexed() if known is None else known
            free_bytes = self._free_now(limits.min_free_bytes) if limits.min_free_bytes else 0
            with self._lock:
                self._used, self._free_bytes = used, free_bytes
                self._since_refresh_bytes -= seen_bytes
                self._adapt(limits, used)

    def _adapt(self, limits: Limits, used: dict[NamespaceId, int]) -> None:
        """Choose step, slack and the time of the next refresh by what is near; holds the lock."""
        writers = self._usage.writers
        quotas = [(own, used.get(namespace, 0)) for namespace, own in limits.namespaces.items()]
        if limits.max_bytes is not None:
            quotas.append((limits.max_bytes, sum(used.values())))
        is_far = all(used_bytes < limit * LOW_SHARE for limit, used_bytes in quotas)
        self._slack_share = SLACK_SHARE if writers > 1 else 0.0
        share = FAR_SHARE / writers if is_far else SLACK_SHARE / 2 / writers
        steps = [int(limit * share) for limit, _ in quotas]
        self._step_bytes = max(1, min([STEP_BYTES, *steps]))
        # How much is free changes without a word from anyone.
        may_wait = is_far and writers == 1 and not limits.min_free_bytes
        interval_s = FAR_REFRESH_S if may_wait else REFRESH_S
        self._refresh_at_s = self._clock.monotonic_s() + interval_s

    def _free_now(self, wanted_bytes: int) -> int:
        try:
            return self._read_free()
        except (PrefixStoreError, OSError):
            # A root that does not say how much is free is not full for that reason: the write that
            # follows will tell.
            return wanted_bytes * 2
