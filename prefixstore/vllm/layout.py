"""Which bytes of a slot a chunk really owns.

A slot has room for every tensor of every worker, but a chunk of one KV group fills only the pages of
its group's layers, and of those pages only what is not padding. The rest holds stale bytes of other
prompts. So a payload is gathered from the owned **spans** of a slot and scattered back into them.

Spans are known where the KV cache is registered, in each worker, and travel to the scheduler process
by the connector's handshake. Offsets in, offsets out, but for ``gather`` and ``scatter``, which copy.
"""

import ctypes
from collections.abc import Iterable, Sequence

import msgspec

__all__ = ["SlotLayout", "Span", "gather", "merge_spans", "scatter"]


class Span(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A run of bytes in a slot: ``offset`` from the slot's start, ``length`` in bytes."""

    offset: int
    length: int


class SlotLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The owned spans of each KV group in one worker's page, by the group's index in vLLM.

    Attributes:
        page_bytes: The worker's page: its share of a slot.
        spans: Group index → spans in ascending order, relative to the worker's page.
    """

    page_bytes: int
    spans: dict[int, list[Span]]

    def payload_bytes(self, group: int) -> int:
        """Return how many bytes of the worker's page a chunk of ``group`` owns."""
        return sum(span.length for span in self.spans[group])


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Sort spans and join those that touch or overlap.

    >>> merge_spans([Span(8, 4), Span(0, 4), Span(4, 4)])
    [Span(offset=0, length=12)]
    """
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.offset <= merged[-1].offset + merged[-1].length:
            last = merged[-1]
            end = max(last.offset + last.length, span.offset + span.length)
            merged[-1] = Span(last.offset, end - last.offset)
        else:
            merged.append(span)
    return merged


def join_workers(layouts: Sequence[SlotLayout]) -> dict[int, list[Span]]:
    """Place each worker's spans at its page in the slot, in rank order.

    Returns:
        Group index → spans of the whole slot, joined where workers' pages touch.
    """
    groups = layouts[0].spans.keys()
    joined: dict[int, list[Span]] = {}
    for group in groups:
        spans: list[Span] = []
        page_offset = 0
        for layout in layouts:
            spans += [Span(page_offset + span.offset, span.length) for span in layout.spans[group]]
            page_offset += layout.page_bytes
        joined[group] = merge_spans(spans)
    return joined


def gather(payload: memoryview, address: int, spans: Sequence[Span]) -> None:
    """Copy a slot's owned spans into a payload; without the GIL."""
    target = ctypes.addressof(ctypes.c_char.from_buffer(payload))
    for span in spans:
        ctypes.memmove(target, address + span.offset, span.length)
        target += span.length


def scatter(payload: memoryview, address: int, spans: Sequence[Span]) -> None:
    """Copy a payload into a slot's owned spans; without the GIL."""
    source = ctypes.addressof(ctypes.c_char.from_buffer(payload))
    for span in spans:
        ctypes.memmove(address + span.offset, source, span.length)
        source += span.length
