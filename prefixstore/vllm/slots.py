"""The slots of vLLM's CPU tier as a source and a target of payloads.

A slot holds a chunk of every worker side by side; a payload is what one KV group owns of it, gathered
(``prefixstore.vllm.layout``). Copies happen on the pump's thread, never the scheduler's.
"""

import ctypes
from collections.abc import Mapping, Sequence

from prefixstore.ioproc.jobs import ChunkLoad, ChunkStore
from prefixstore.keys import Key, kv_group
from prefixstore.vllm.layout import Span, gather, scatter

__all__ = ["Slots"]


class Slots:
    """The slots, and which bytes of them each KV group owns. Immutable.

    Attributes:
        spans: For each KV group, the bytes of a slot that its chunks own.
        payload_bytes: The size of a chunk's payload, by KV group.
    """

    def __init__(
        self, view: memoryview, *, spans: Mapping[int, Sequence[Span]], element_bytes: int
    ) -> None:
        """Describe the slots of a CPU tier.

        Args:
            view: The CPU tier, of shape (slots, bytes of a slot); to be held for as long as this is used.
            spans: For each KV group, the bytes of a slot that its chunks own.
            element_bytes: The size of one KV element.
        """
        self._count, self._slot_bytes = view.shape or (0, 0)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if self._count else 0
        self._element_bytes = element_bytes
        self.spans = spans
        self.payload_bytes = {
            group: sum(span.length for span in owned) for group, owned in spans.items()
        }

    def load(self, key: Key, slot: int) -> ChunkLoad:
        """Describe a load of a chunk into a slot."""
        group = kv_group(key)
        address, spans = self._place(slot), self.spans[group]
        return ChunkLoad(
            key=key,
            raw_bytes=self.payload_bytes[group],
            land=lambda payload: scatter(payload, address, spans),
        )

    def store(self, key: Key, slot: int, *, end_token: int, parent: Key | None) -> ChunkStore:
        """Describe a store of a chunk from a slot."""
        group = kv_group(key)
        address, spans = self._place(slot), self.spans[group]
        return ChunkStore(
            key=key,
            parent=parent,
            end_token=end_token,
            element_bytes=self._element_bytes,
            raw_bytes=self.payload_bytes[group],
            fill=lambda payload: gather(payload, address, spans),
        )

    def _place(self, slot: int) -> int:
        assert 0 <= slot < self._count, f"slot {slot} of {self._count}"
        return self._address + slot * self._slot_bytes
