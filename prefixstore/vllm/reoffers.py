"""Chunks that vLLM offered while the store could not take them, to be asked for again later.

vLLM offers a chunk once: when it is computed. Refused then, it stays in the CPU tier and is served from
there, but never reaches the root, unless it is turned out and computed anew. So a chunk that was refused
for a passing reason (the store was off, a mount hung, the disk was full, too many waited) is noted here,
with its place in its prefix. Once the store takes stores again, those that the CPU tier still holds are
offered by vLLM's own way for tiers that ask for chunks (``SecondaryTierManager.serve_external_requests``).

Books only: no I/O, no clock of its own. Not thread-safe.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, TierFilter
from vllm.v1.kv_offload.tiering.base import ParentManager, TransferJob

from prefixstore.keys import Key

__all__ = ["Place", "Reoffers", "pin_chunks"]

Place = tuple[int, Key | None]
"""Where a chunk is in its prefix: its end token, and its parent."""

REFUSED_MAX = 8192
"""Chunks to remember, some 2 MB; more than most CPU tiers hold. Of more, the oldest are forgotten: the
CPU tier turns out the oldest first, too."""
ASKED_MAX = 64
"""Chunks to ask for at a time: their slots are pinned until they are stored."""
PAUSE_FIRST_S = 1.0
PAUSE_LONGEST_S = 30.0
"""A root that refuses again is asked ever more rarely: each attempt costs a copy of each chunk."""

LASTING_REASONS = frozenset({"bypassed", "error", "read_only"})
"""Refused for good: on purpose, by a bug of ours, or by an operator."""


class Reoffers:
    """The refused chunks, oldest first, and when to ask for them."""

    def __init__(self) -> None:
        self._places: OrderedDict[Key, Place] = OrderedDict()
        self._job: int | None = None
        self._pause_s = 0.0
        self._ask_at_s = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def refused(self, places: Mapping[Key, Place], reason: str) -> None:
        """Remember chunks that were refused, unless the reason will not pass."""
        if reason in LASTING_REASONS:
            return
        self._places.update(places)
        while len(self._places) > REFUSED_MAX:
            self._places.popitem(last=False)

    def due(self, now_s: float, *, slots: int) -> dict[Key, Place]:
        """Take the chunks to ask for now: none while some are under way, or soon after a refusal.

        Args:
            now_s: On the monotonic clock.
            slots: How many the CPU tier has; a quarter of them may be pinned for this.
        """
        if not self._places or self._job is not None or now_s < self._ask_at_s:
            return {}
        count = min(len(self._places), max(1, min(ASKED_MAX, slots // 4)))
        return dict(self._places.popitem(last=False) for _ in range(count))

    def started(self, job: int) -> None:
        """Note the job that stores what was asked for."""
        self._job = job

    def ended(self, job: int, now_s: float, *, stored: int, skipped: int) -> None:
        """Note how many chunks of a job were stored and skipped, if it is the one that was started.

        After a job that was refused whole the next waits twice as long as the last; one of which some
        was stored, as on a root that makes room bit by bit, is followed soon.
        """
        if job != self._job:
            return
        self._job = None
        if not skipped:
            self._pause_s = 0.0
        elif stored:
            self._pause_s = PAUSE_FIRST_S
        else:
            self._pause_s = min(PAUSE_LONGEST_S, max(PAUSE_FIRST_S, 2 * self._pause_s))
        self._ask_at_s = now_s + self._pause_s


def pin_chunks(
    parent: ParentManager, keys: Collection[Key], *, request_id: str
) -> TransferJob | None:
    """Take a store job for those chunks that the CPU tier still holds; None if it holds none.

    The job is vLLM's like any other: its slots are pinned until its result is reported.
    """
    # The filter lets no tier in: none is to bring what the CPU tier has lost meanwhile.
    context = ReqContext(req_id=request_id, load_tier_filter=TierFilter())
    parent.on_new_request(context)
    try:
        held = [
            key for key in map(OffloadKey, keys) if parent.lookup(key, context) is LookupResult.HIT
        ]
        return parent.create_store_job(held, context) if held else None
    finally:
        parent.on_request_finished(context)
