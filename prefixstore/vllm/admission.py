"""Which matches are loaded: those that pay, and that the CPU tier has room for.

Books only: no I/O, no clock of its own. Not thread-safe.
"""

from collections.abc import Mapping
from typing import Literal

from prefixstore.keys import kv_group
from prefixstore.vllm import metrics
from prefixstore.vllm.lookups import Budget, RequestLookup
from prefixstore.vllm.worth import LoadMeter, LoadWorth, PrefillMeter

__all__ = ["Admission"]

PATIENCE_S = 20.0
"""How long a match waits for room in the CPU tier before it is recomputed instead.

Room comes free when another request is scheduled: seconds on a busy engine."""


class Admission:
    """Decides the match of each request.

    Attributes:
        prefill: Measures how fast prompts are computed; told of the engine's steps.
        loads: Measures how fast chunks are loaded; told of each load.
    """

    def __init__(
        self, *, slots: int, policy: Literal["auto", "always"], observed: metrics.TierMetrics
    ) -> None:
        self._budget = Budget(slots)
        self._policy = policy
        self._observed = observed
        self.prefill = PrefillMeter()
        self._worth = LoadWorth(prefill=self.prefill.rate)
        self.loads = LoadMeter(self._worth.loads)
        self._waits_since_s: dict[str, float] = {}

    @property
    def slots(self) -> int:
        """How many chunks the CPU tier has room for."""
        return self._budget.slots

    def decide(
        self,
        request_id: str,
        lookup: RequestLookup,
        *,
        payload_bytes: Mapping[int, int],
        now_s: float,
    ) -> None:
        """Admit the match of a request whose verdicts are all in, or leave it waiting for room.

        Args:
            request_id: The request.
            lookup: Its lookups; told what was decided.
            payload_bytes: The size of a chunk, by KV group.
            now_s: On the monotonic clock.
        """
        wanted = lookup.wanted()
        if wanted and request_id not in self._waits_since_s:
            load_bytes = sum(payload_bytes[kv_group(key)] for key in wanted)
            tokens = lookup.saved_tokens(wanted)
            if self._policy == "auto" and not self._worth.pays(
                load_bytes=load_bytes, tokens=tokens, now_s=now_s
            ):
                lookup.decide(())
                self._observed.count(metrics.DECLINED_HITS, "slower", by=len(wanted))
                return
        fitting = lookup.wanted(most=max(0, self._budget.slots - lookup.hits))
        since_s = self._waits_since_s.setdefault(request_id, now_s)
        if fitting and not self._budget.reserve(request_id, len(fitting)):
            if now_s - since_s <= PATIENCE_S:
                return
            fitting = []
        lookup.decide(fitting)
        self._observed.count(metrics.DECLINED_HITS, "no_room", by=len(wanted) - len(fitting))
        self._waits_since_s.pop(request_id, None)

    def release(self, request_id: str) -> None:
        """End what was promised to a request: it was scheduled, or has ended."""
        self._budget.release(request_id)
        self._waits_since_s.pop(request_id, None)
