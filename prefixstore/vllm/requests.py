"""What the tier remembers of one request, from its arrival to its end. Books only."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from prefixstore.keys import Key, derive_key
from prefixstore.vllm.adapters import AdapterUse
from prefixstore.vllm.compat import request_keys
from prefixstore.vllm.lookups import Answer, Chains, Question, RequestLookup
from prefixstore.vllm.reoffers import Place

__all__ = ["TierRequest"]


@dataclass(slots=True, eq=False)
class TierRequest:
    """One request of the engine.

    Attributes:
        lookup: What was asked and answered of its keys.
        decided_in_step: The engine's step in which its match was last tried for room.
        bypassed: Whether it neither loads nor stores: its KV depends on more than is known.
        use: Its adapter, if it has one that the store serves.
    """

    context: ReqContext
    lookup: RequestLookup
    decided_in_step: int = -1
    bypassed: bool = False
    use: AdapterUse | None = None
    _chains: Chains = field(default_factory=Chains)

    def refuse(self, now_s: float) -> Answer | None:
        """Answer all questions alike while nothing may be loaded; None: ask the store.

        What may be loaded has to be of what the request computes with.
        """
        if self.bypassed:
            return Answer.MISS
        if self.use is None or self.use.may_load:
            return None
        return Answer.RETRY if self.use.may_load_soon(now_s) else Answer.MISS

    @property
    def is_named(self) -> bool:
        """Whether ``name`` can tell the store's keys."""
        return not self.bypassed and (self.use is None or self.use.adapter.digest is not None)

    def name(self, key: Key) -> Key:
        """Return the key that the store knows a chunk of this request by."""
        if self.use is None:
            return key
        assert self.use.adapter.digest is not None, "proved before its chunks are named"
        return derive_key(key, self.use.adapter.digest)

    def miss(self, question: Question) -> None:
        """Take it that the store has none of the keys that it was to be asked about."""
        self.lookup.take_verdict(question, [False] * len(question.keys))

    def chain(self) -> list[Key]:
        """Return vLLM's keys of the whole request."""
        return [key for key, _ in request_keys(self.context)]

    def places(self, keys: Iterable[OffloadKey]) -> dict[Key, Place]:
        """Return where chunks of the request are in its prefix."""
        self._chains.learn(request_keys(self.context, start=len(self._chains)))
        return {Key(key): self._chains.place(Key(key)) for key in keys}
