"""Which adapters are surely in the workers' memory, told from the scheduler's side.

A worker keeps the ``max_cpu_loras`` adapters that were used last and reads any other anew from its files
(vllm/lora/worker_manager.py, ``LRUCacheWorkerLoRAManager``). The scheduler is not told which. But an
adapter that was loaded leaves only after that many *others* were used since it was used last; so where
fewer others were mentioned, it is there still, and files replaced meanwhile do not matter.

Pure. Not thread-safe.
"""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Residency", "Stay"]


@dataclass(slots=True, eq=False)
class Stay:
    """One stay of an adapter in the workers' memory, from a mention that may load it to its end.

    Attributes:
        others: Adapters that may have been used since this one was used last.
        is_proven: Whether it was loaded in this stay, with the content that its files are known by.
        is_over: Whether it may have left.
        decided_by_s: Until when on the monotonic clock a proof may still come that was asked for as soon
            as it was loaded; requests wait for it.
    """

    others: set[int] = field(default_factory=set)
    is_proven: bool = False
    is_over: bool = False
    decided_by_s: float = 0.0


class Residency:
    """Stays of adapters, by vLLM's id of each."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pinned: set[int] = set()
        self._stays: dict[int, Stay] = {}
        self._running: Counter[int] = Counter()  # Requests that have not ended.

    def __len__(self) -> int:
        return len(self._stays)

    def mention(self, adapter_id: int) -> Stay:
        """Note that an adapter is about to be used, before anything loads it."""
        for other_id, stay in list(self._stays.items()):
            if other_id != adapter_id:
                stay.others.add(adapter_id)
            self._end_if_crowded(other_id, stay)
        stay = self._stays.setdefault(adapter_id, Stay())
        stay.others |= self._others_running(adapter_id)
        self._end_if_crowded(adapter_id, stay)
        return stay

    def used(self, adapter_id: int) -> None:
        """Note that the workers' next step uses an adapter, or that they were just told to load it.

        From here on only those count that may be used after it: a mention alone does not make it recent.
        """
        if (stay := self._stays.get(adapter_id)) is not None:
            stay.others = self._others_running(adapter_id)

    def begin_request(self, adapter_id: int) -> None:
        """Note that a request uses an adapter until ``end_request``."""
        self._running[adapter_id] += 1

    def end_request(self, adapter_id: int) -> None:
        """Note the end of a request."""
        self._running[adapter_id] -= 1
        if not self._running[adapter_id]:
            del self._running[adapter_id]

    def pin(self, adapter_id: int) -> None:
        """Note that an adapter never leaves, and so leaves less room to the others."""
        self._pinned.add(adapter_id)
        for other_id, stay in list(self._stays.items()):
            self._end_if_crowded(other_id, stay)

    def _others_running(self, adapter_id: int) -> set[int]:
        """Return those that were mentioned before, and may be used at any time until their requests end."""
        return {other for other in self._running if other != adapter_id}

    def _end_if_crowded(self, adapter_id: int, stay: Stay) -> None:
        if len(stay.others - self._pinned) >= self._capacity - len(self._pinned):
            self.end(adapter_id)

    def end(self, adapter_id: int) -> None:
        """Note that an adapter may have left, or is about to be loaded anew."""
        if (stay := self._stays.pop(adapter_id, None)) is not None:
            stay.is_over = True
