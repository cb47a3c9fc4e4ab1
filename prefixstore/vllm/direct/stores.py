"""The stores of one worker: blocks → staging buffer → the I/O process, which publishes them.

    waiting      for a buffer; dropped when a step gives the blocks to somebody else
    being copied the device reads the blocks; a step that overwrites them begins after that, on the device
    copied       until the step that computed them is known to have come through on every rank
    published    by the I/O process

Several orders for one chunk may wait, each with its own blocks, since any of them may lose these. One is copied.
"""

import contextlib
import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import ChunkStore, StoreDone
from prefixstore.keys import kv_group
from prefixstore.vllm.direct.device import Device, Mark
from prefixstore.vllm.direct.messages import StepOrders, StoreOrder
from prefixstore.vllm.direct.observer import Observer
from prefixstore.vllm.direct.pages import Pages, join_copies
from prefixstore.vllm.direct.ring import Lease, StagingRing

if TYPE_CHECKING:
    from prefixstore.keys import Key

__all__ = ["STORES_WAITING_MAX", "Stores"]

logger = logging.getLogger("prefixstore")

LEASES_FOR_LOADS = 2
"""Buffers that stores leave free, so that a request never waits for the store of another."""

STORES_WAITING_MAX = 65536
"""Chunks that wait for a buffer while their blocks are theirs: half a kilobyte of books each."""


@dataclass(slots=True, eq=False)
class _Batch:
    """Stores whose copy to staging buffers was submitted.

    Attributes:
        mark: Where the copy ends.
        step: The last step that computed any of their blocks.
        is_void: What was copied may be another's: none of it is published.
    """

    stores: list[tuple[StoreOrder, Lease]]
    mark: Mark
    step: int
    is_void: bool = False


class Stores:
    """Moves the stores of one worker. For the model's thread.

    Args:
        pages: Of each KV group, by vLLM's number of it.
        next_ticket: Gives the tickets of the I/O client.

    Attributes:
        settled: Numbers of stores whose blocks are no longer needed; for the caller to take.
    """

    def __init__(
        self,
        *,
        pages: Sequence[Pages],
        device: Device,
        ring: StagingRing,
        observer: Observer,
        element_bytes: int,
        next_ticket: Callable[[], int],
    ) -> None:
        self._pages = tuple(pages)
        self._device = device
        self._ring = ring
        self._observer = observer
        self._element_bytes = element_bytes
        self._next_ticket = next_ticket
        self._step = 0
        self._waiting: deque[StoreOrder] = deque()
        self._batches: deque[_Batch] = deque()
        self._publishing: dict[int, tuple[StoreOrder, Lease]] = {}
        self._keys: set[Key] = set()  # Of all that is being copied or published.
        self.settled: list[int] = []

    def __len__(self) -> int:
        """Return how many have not ended."""
        return len(self._waiting) + len(self._keys)

    @property
    def is_moving(self) -> bool:
        """Whether any wait for a buffer, for their copy, or for its step to be known to have come through."""
        return bool(self._waiting or self._batches)

    def take(self, orders: Iterable[StoreOrder], *, step: int) -> None:
        """Take orders for blocks that were computed by a step, or by one before it."""
        for order in orders:
            if len(self._waiting) >= STORES_WAITING_MAX:
                self._skip(order, "busy")
            else:
                self._step = max(self._step, step)
                self._waiting.append(order)

    def lose(self, orders: StepOrders) -> None:
        """Read no more of the blocks that a step overwrites; before its work is submitted."""
        lost = set(orders.overwritten)
        if not lost and not orders.are_all_overwritten:
            return

        def is_lost(order: StoreOrder) -> bool:
            return orders.are_all_overwritten or order.number in lost

        self._drop(is_lost, "overwritten")
        for batch in self._batches:
            if any(is_lost(order) for order, _ in batch.stores):
                self._device.hold_model(batch.mark)

    def drop(self, reason: str) -> None:
        """Copy nothing of what waits."""
        self._drop(lambda _: True, reason)

    def void(self, reason: str) -> None:
        """Publish nothing of what waits or is being copied. Waits for nothing."""
        for batch in self._batches:
            batch.is_void = True
        self.drop(reason)

    def copy(self) -> bool:
        """Start as many copies to staging buffers as there are buffers; return whether there was any."""
        chosen: list[tuple[StoreOrder, Lease]] = []
        while self._waiting:
            if self._waiting[0].key in self._keys:
                self._settle(self._waiting.popleft())  # It is on its way from other blocks.
            elif (lease := self._lease()) is not None:
                order = self._waiting.popleft()
                self._keys.add(order.key)
                chosen.append((order, lease))
            else:
                break
        if chosen:
            self._copy_batch(chosen)
        return bool(chosen)

    def publish(self, client: IoClient | None, *, proven: int, is_last: bool) -> None:
        """Hand the buffers of finished copies to the I/O process; their blocks are free.

        Args:
            client: Of the I/O process.
            proven: The last step that is known to have come through on every rank.
            is_last: No later step will be known to: what is not proven is dropped.
        """
        while self._batches and self._device.is_past(self._batches[0].mark):
            batch = self._batches[0]
            is_proven = batch.step <= proven
            if not (is_proven or is_last or batch.is_void):
                return
            self._batches.popleft()
            for order, _ in batch.stores:
                self._settle(order)
            for order, lease in batch.stores:
                if client is None or batch.is_void or not is_proven:
                    self._end(order, lease, skipped="error" if batch.is_void else "off")
                    continue
                try:
                    self._submit(client, order, lease)
                except Exception:
                    logger.exception("a chunk could not be handed to the I/O process")
                    self._end(order, lease, skipped="error")

    def end(self, done: StoreDone) -> None:
        """Take what came of a store that the I/O process was given."""
        order, lease = self._publishing.pop(done.ticket)
        self._end(order, lease, skipped=next(iter(done.skipped.values()), None))
        self._observer.moved(stored_bytes=done.stored_bytes)

    def abandon(self) -> None:
        """Forget what waits and what is being copied after a bug of ours; the device has finished."""
        batches, self._batches = self._batches, deque()
        for order, lease in [pair for batch in batches for pair in batch.stores]:
            self._settle(order)
            self._end(order, lease, skipped="error")
        self.drop("error")

    # Inside.

    def _lease(self) -> Lease | None:
        return self._ring.acquire(leave=min(LEASES_FOR_LOADS, self._ring.count - 1))

    def _copy_batch(self, stores: list[tuple[StoreOrder, Lease]]) -> None:
        try:
            copies = join_copies(
                [
                    self._pages_of(order.key).copies(lease.address, order.blocks)
                    for order, lease in stores
                ]
            )
            mark = self._device.store(copies, after=self._device.now())
        except Exception:
            # If a part of it is under way, it ends before the buffers are another's.
            with contextlib.suppress(Exception):
                self._device.finish()
            for order, lease in stores:
                self._settle(order)
                self._end(order, lease, skipped="error")
            raise
        self._batches.append(_Batch(stores, mark, self._step))

    def _submit(self, client: IoClient, order: StoreOrder, lease: Lease) -> None:
        payload_bytes = self._pages_of(order.key).payload_bytes

        def fill(payload: memoryview) -> None:
            target = ctypes.addressof(ctypes.c_char.from_buffer(payload))
            ctypes.memmove(target, lease.address, payload_bytes)
            lease.release()

        ticket = self._next_ticket()
        chunk = ChunkStore(
            key=order.key,
            parent=order.parent,
            end_token=order.end_token,
            element_bytes=self._element_bytes,
            raw_bytes=payload_bytes,
            fill=fill,
        )
        if client.store(ticket, [chunk]):
            self._publishing[ticket] = (order, lease)
        else:
            self._end(order, lease, skipped="busy")

    def _end(self, order: StoreOrder, lease: Lease, *, skipped: str | None) -> None:
        lease.release()
        self._keys.discard(order.key)
        if skipped is not None:
            self._observer.skipped(skipped)

    def _drop(self, is_dropped: Callable[[StoreOrder], bool], reason: str) -> None:
        """Drop the waiting stores that ``is_dropped`` names."""
        waiting, self._waiting = self._waiting, deque()
        for order in waiting:
            if is_dropped(order):
                self._skip(order, reason)
            else:
                self._waiting.append(order)

    def _skip(self, order: StoreOrder, reason: str) -> None:
        self._settle(order)
        self._observer.skipped(reason)

    def _settle(self, order: StoreOrder) -> None:
        """Note that a store no longer needs its blocks."""
        self.settled.append(order.number)

    def _pages_of(self, key: "Key") -> Pages:
        return self._pages[kv_group(key)]
