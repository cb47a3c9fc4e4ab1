"""A worker's side of the direct path: its part of each chunk, device ↔ ring ↔ I/O process.

The model's thread calls everything here in each step, and nothing here waits for I/O or for a copy.

- **Load**: blob → the I/O process's buffer, verified → (pump thread) staging buffer → device. A load is
  reported when its copy is seen past, or when it has failed; the blocks of chunks that failed are
  reported with it, and the engine computes them.
- **Store**: once the step has computed the blocks, device → staging buffer; then the blocks are free,
  and the I/O process publishes the buffer. Stores for which no buffer is free wait, their blocks held
  by their request, for a bounded time; then they are dropped.

A load that comes late reaches nothing: before it copies, the pump asks under a lock whether the chunk
is still wanted, and it is not once it was reported.
"""

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prefixstore.clock import Clock
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import (
    ChunkLoad,
    ChunkStore,
    Completion,
    FindDone,
    LoadDone,
    StoreDone,
)
from prefixstore.vllm.direct.device import Device, Mark
from prefixstore.vllm.direct.messages import (
    FindOrder,
    LoadChunk,
    LoadOrder,
    RankReport,
    StepOrders,
    StoreOrder,
)
from prefixstore.vllm.direct.pages import Pages, join_copies
from prefixstore.vllm.direct.ring import Lease, StagingRing

if TYPE_CHECKING:
    from prefixstore.keys import Key

__all__ = ["OPEN_PATIENCE_S", "DirectWorker", "Observer", "Patience"]

logger = logging.getLogger("prefixstore")

OPEN_PATIENCE_S = 5.0
"""How long the first lookups of an engine wait for its store to open: it takes a second or so, and an
engine that just came back is asked about the longest prefixes."""

LEASES_FOR_LOADS = 2
"""Buffers that stores leave free, so that a request never waits for the store of another."""

STORES_WAITING_MAX = 65536
"""Chunks that wait with their blocks held by running requests: some kilobytes of books each."""


class Observer(Protocol):
    """Who counts what happened. Reasons are metric labels."""

    def missed(self, reason: str, chunks: int = 1) -> None:
        """Count chunks that a lookup had found and that were not loaded."""
        ...

    def skipped(self, reason: str, chunks: int = 1) -> None:
        """Count chunks that were offered and not stored."""
        ...

    def moved(self, *, loaded_bytes: int = 0, stored_bytes: int = 0) -> None:
        """Count bytes that came from the store and that went there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long each kind of work may see no progress, in seconds.

    Attributes:
        load: Queued loads of a request; those under way have the I/O client's deadline.
        hold: Blocks of a finished request that wait to be stored: memory that others may need.
    """

    load: float = 10.0
    hold: float = 5.0


@dataclass(slots=True, eq=False)
class _Load:
    """The load of one request; ``failed`` are blocks that were not brought."""

    order: LoadOrder
    fence: Mark
    moved_s: float
    queue: deque[LoadChunk]
    under_way: int = 0
    failed: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Chunk:
    """One chunk on its way in; ``is_wanted``, ``is_landed`` and ``mark`` belong to the landing lock.

    Attributes:
        is_wanted: False once it was given up; nothing is copied for it any more.
        is_landed: The copy to the device was submitted, and ends at ``mark``.
        is_read: The I/O client is done with it.
    """

    load: _Load
    chunk: LoadChunk
    lease: Lease
    is_wanted: bool = True
    is_landed: bool = False
    is_read: bool = False
    mark: Mark = None


@dataclass(slots=True, eq=False)
class _Batch:
    """Stores whose copy to staging buffers is under way."""

    stores: list[tuple[StoreOrder, Lease]]
    mark: Mark


class DirectWorker:
    """Moves one worker's KV. For the model's thread, but ``bind`` and ``turn_off``."""

    def __init__(
        self,
        *,
        pages: Pages,
        device: Device,
        ring: StagingRing,
        observer: Observer,
        patience: Patience,
        clock: Clock,
        element_bytes: int,
    ) -> None:
        self._pages = pages
        self._device = device
        self._ring = ring
        self._observer = observer
        self._patience = patience
        self._clock = clock
        self._element_bytes = element_bytes
        self._client: IoClient | None = None
        self._off_reason: str | None = None
        self._landing = threading.Lock()
        self._tickets = 0
        self._started_s = clock.monotonic_s()
        self._finds_waiting: deque[FindOrder] = deque()
        self._finds: dict[int, int] = {}
        self._loads: dict[str, _Load] = {}
        self._chunks: dict[int, _Chunk] = {}
        self._stores_waiting: deque[StoreOrder] = deque()
        self._batches: deque[_Batch] = deque()
        self._storing: dict[int, tuple[StoreOrder, Lease]] = {}
        self._keys_storing: set[Key] = set()
        self._unread: dict[str, int] = {}
        self._held: dict[str, float] = {}
        self._failed_blocks: set[int] = set()
        self._report = RankReport()

    def bind(self, client: IoClient) -> None:
        """Serve from a store: from now on lookups may find something."""
        self._client = client

    def turn_off(self, reason: str) -> None:
        """Neither find nor store any more; loads under way still end."""
        if self._off_reason is None:
            logger.warning("store is off: %s", reason)
            self._off_reason = reason

    @property
    def state(self) -> str:
        """What the store can do now, as metrics tell it."""
        if self._off_reason is not None:
            return "off"
        return self._client.state if self._client is not None else "opening"

    # The steps of vLLM, in this order.

    def lose_blocks(self, request_ids: Iterable[str]) -> None:
        """Read no more from the blocks of preempted requests: this step overwrites them."""
        lost = set(request_ids)
        if not lost:
            return
        self._drop_stores(lambda order: order.request_id in lost, "preempted")
        for batch in self._batches:
            if any(order.request_id in lost for order, _ in batch.stores):
                self._device.hold_model(batch.mark)

    def start(self, orders: StepOrders) -> None:
        """Take a step's finds and loads."""
        if orders.is_off:
            self.turn_off(
                "the engine's cache was reset or its workers were called, as for a weight update"
            )
            # What is on its way was computed by the weights of before.
            for load in self._loads.values():
                load.queue.clear()
                load.failed.update(b for chunk in load.order.chunks for b in chunk.blocks)
        now_s = self._clock.monotonic_s()
        self._finds_waiting += orders.finds
        for order in orders.loads:
            self._loads[order.request_id] = _Load(
                order=order,
                fence=self._device.now(),
                moved_s=now_s,
                queue=deque(order.chunks),
                failed=set(order.doomed),
            )
        if orders.touched and self._client is not None and self._off_reason is None:
            self._client.touch(orders.touched)

    def refuse(self, orders: StepOrders) -> None:
        """Report a step's loads as failed, those that ``start`` did not come to."""
        for order in orders.loads:
            if order.request_id not in self._loads:
                blocks = {block for chunk in order.chunks for block in chunk.blocks}
                self._loads[order.request_id] = _Load(
                    order=order,
                    fence=None,
                    moved_s=0.0,
                    queue=deque(),
                    failed=blocks | set(order.doomed),
                )

    def save(self, orders: StepOrders) -> None:
        """Take a step's stores; the step's forward pass has been submitted."""
        now_s = self._clock.monotonic_s()
        for order in orders.stores:
            self._unread[order.request_id] = self._unread.get(order.request_id, 0) + 1
            if order.key in self._keys_storing or len(self._stores_waiting) >= STORES_WAITING_MAX:
                self._settle(order)
            else:
                self._keys_storing.add(order.key)
                self._stores_waiting.append(order)
        self._held.update(dict.fromkeys(orders.held, now_s))
        self._copy_stores()

    def poll(self) -> tuple[set[str], set[str]]:
        """Move everything on; return the requests whose blocks were read, and whose loads ended."""
        now_s = self._clock.monotonic_s()
        if self._client is not None:
            for completion in self._client.poll():
                self._take(completion)
        self._answer_finds(now_s)
        self._end_copies(now_s)
        self._start_loads(now_s)
        self._end_batches()
        self._copy_stores()
        self._end_holding(now_s)
        loaded = {
            request_id
            for request_id, load in self._loads.items()
            if not load.under_way and not load.queue
        }
        for request_id in loaded:
            self._failed_blocks |= self._loads.pop(request_id).failed
        read = {request_id for request_id in self._held if request_id not in self._unread}
        for request_id in read:
            del self._held[request_id]
        return read, loaded

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks of ended loads that hold nothing, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> RankReport | None:
        """Return what the scheduler's side is to know, once."""
        report, self._report = self._report, RankReport()
        return report if report.found or report.settled else None

    @property
    def is_waiting(self) -> bool:
        """Whether requests wait for this worker."""
        return bool(self._loads or self._finds or self._finds_waiting or self._held)

    def abandon(self) -> tuple[set[str], set[str]]:
        """Give everything up after a bug of ours; return what ``poll`` would. Nothing lands any more."""
        with self._landing:
            for chunk in self._chunks.values():
                chunk.is_wanted = False
        with contextlib.suppress(Exception):  # A device that cannot finish does nothing any more.
            self._device.finish()
        for chunk in self._chunks.values():
            chunk.lease.release()
        self._chunks.clear()
        for order, lease in [pair for batch in self._batches for pair in batch.stores]:
            self._end_store(order, lease, skipped="error")
        self._keys_storing.difference_update(order.key for order in self._stores_waiting)
        self._batches.clear()
        self._stores_waiting.clear()
        self._unread.clear()
        held, self._held = set(self._held), {}
        loads, self._loads = self._loads, {}
        for load in loads.values():
            self._failed_blocks |= {b for c in load.order.chunks for b in c.blocks}
            self._failed_blocks |= set(load.order.doomed)
        return held, set(loads)

    def close(self, timeout_s: float) -> None:
        """Publish what was read from the device, for a bounded time, and end the I/O process."""
        self._end_batches()
        if (client := self._client) is not None:
            client.close(timeout_s)

    # Finds.

    def _answer_finds(self, now_s: float) -> None:
        client = self._client
        is_ready = client is not None and client.ready and self._off_reason is None
        is_opening = self.state == "opening" and now_s - self._started_s < OPEN_PATIENCE_S
        if is_opening and not is_ready:
            return
        while self._finds_waiting:
            order = self._finds_waiting.popleft()
            if client is None or not is_ready:
                self._report.found[order.ticket] = 0
                continue
            ticket = self._next_ticket()
            self._finds[ticket] = order.ticket
            client.find(ticket, order.keys, chained=True)

    # Loads.

    def _start_loads(self, now_s: float) -> None:
        for load in self._loads.values():
            is_stale = now_s - load.moved_s > self._patience.load and not load.under_way
            if load.queue and (self.state not in ("on", "read_only") or is_stale or load.failed):
                # Whatever follows a missing chunk is computed anyway.
                reason = "timeout" if is_stale else "off" if not load.failed else None
                if reason is not None:
                    self._observer.missed(reason, len(load.queue))
                load.failed.update(block for chunk in load.queue for block in chunk.blocks)
                load.queue.clear()
            while load.queue and (lease := self._ring.acquire()) is not None:
                self._start_load(load, load.queue.popleft(), lease)

    def _start_load(self, load: _Load, chunk: LoadChunk, lease: Lease) -> None:
        assert self._client is not None, "the state says so"
        moving = _Chunk(load=load, chunk=chunk, lease=lease)
        ticket = self._next_ticket()
        self._chunks[ticket] = moving
        load.under_way += 1
        self._client.load(
            ticket,
            [
                ChunkLoad(
                    key=chunk.key,
                    raw_bytes=self._pages.payload_bytes,
                    land=lambda payload: self._land(moving, payload),
                )
            ],
        )

    def _land(self, moving: _Chunk, payload: memoryview) -> None:
        """Bring a verified payload to the device. On the pump's thread."""
        with self._landing:
            if not moving.is_wanted:
                return
            try:
                source = ctypes.addressof(ctypes.c_char.from_buffer(payload))
                ctypes.memmove(moving.lease.address, source, self._pages.payload_bytes)
                copies = self._pages.copies(
                    moving.lease.address, moving.chunk.blocks, first=moving.chunk.first
                )
                moving.mark = self._device.load(copies, after=moving.load.fence)
                moving.is_landed = True
            except Exception:
                # The pump would take it for a bug of its own and lose all that is in flight.
                logger.exception("a chunk could not be copied to the device")
                # If a part of it was submitted all the same, it ends before the blocks are another's.
                with contextlib.suppress(Exception):
                    self._device.finish()

    def _end_copies(self, now_s: float) -> None:
        """End the chunks whose copy to the device is past."""
        for ticket, moving in list(self._chunks.items()):
            if not moving.is_read or not self._device.is_past(moving.mark):
                continue
            del self._chunks[ticket]
            moving.lease.release()
            moving.load.under_way -= 1
            moving.load.moved_s = now_s

    def _fail(self, ticket: int, reason: str) -> None:
        moving = self._chunks.pop(ticket, None)
        if moving is None:
            return  # Given up before.
        with self._landing:
            moving.is_wanted = False
        self._observer.missed(reason)
        moving.lease.release()
        moving.load.under_way -= 1
        moving.load.failed.update(moving.chunk.blocks)

    def _take_load(self, done: LoadDone) -> None:
        moving = self._chunks.get(done.ticket)
        if moving is None:
            return
        if not moving.is_landed:
            self._fail(done.ticket, next(iter(done.missed.values()), "error"))
            return
        moving.is_read = True
        self._observer.moved(loaded_bytes=done.landed_bytes)

    # Stores.

    def _copy_stores(self) -> None:
        """Start as many copies to staging buffers as there are buffers."""
        if self.state != "on":
            if self.state != "opening":
                self._drop_stores(lambda _: True, self.state)
            return
        leave = min(LEASES_FOR_LOADS, self._ring.count - 1)
        chosen: list[tuple[StoreOrder, Lease]] = []
        while self._stores_waiting and (lease := self._ring.acquire(leave=leave)) is not None:
            chosen.append((self._stores_waiting.popleft(), lease))
        if not chosen:
            return
        try:
            copies = join_copies(
                [self._pages.copies(lease.address, order.blocks) for order, lease in chosen]
            )
            mark = self._device.store(copies, after=self._device.now())
        except Exception:
            # If a part of it was submitted all the same, it ends before the buffers are another's.
            with contextlib.suppress(Exception):
                self._device.finish()
            for order, lease in chosen:
                self._settle(order)
                self._end_store(order, lease, skipped="error")
            raise
        self._batches.append(_Batch(chosen, mark))
        self._end_batches()

    def _end_batches(self) -> None:
        """Hand the buffers of finished copies to the I/O process; their blocks are free."""
        while self._batches and self._device.is_past(self._batches[0].mark):
            stores = self._batches.popleft().stores
            for order, _ in stores:
                self._settle(order)
            for order, lease in stores:
                self._submit_store(order, lease)

    def _submit_store(self, order: StoreOrder, lease: Lease) -> None:
        def fill(payload: memoryview) -> None:
            target = ctypes.addressof(ctypes.c_char.from_buffer(payload))
            ctypes.memmove(target, lease.address, self._pages.payload_bytes)
            lease.release()

        assert self._client is not None, "a store is copied when there is one"
        ticket = self._next_ticket()
        chunk = ChunkStore(
            key=order.key,
            parent=order.parent,
            end_token=order.end_token,
            element_bytes=self._element_bytes,
            raw_bytes=self._pages.payload_bytes,
            fill=fill,
        )
        if self._client.store(ticket, [chunk]):
            self._storing[ticket] = (order, lease)
        else:
            self._end_store(order, lease, skipped="busy")

    def _end_store(self, order: StoreOrder, lease: Lease, *, skipped: str | None) -> None:
        lease.release()
        self._keys_storing.discard(order.key)
        if skipped is not None:
            self._observer.skipped(skipped)

    def _drop_stores(self, is_dropped: Callable[[StoreOrder], bool], reason: str) -> None:
        """Drop the waiting stores that ``is_dropped`` names."""
        kept: deque[StoreOrder] = deque()
        for order in self._stores_waiting:
            if is_dropped(order):
                self._keys_storing.discard(order.key)
                self._observer.skipped(reason)
                self._settle(order)
            else:
                kept.append(order)
        self._stores_waiting = kept

    def _settle(self, order: StoreOrder) -> None:
        """Note that a store no longer needs its blocks."""
        self._report.settled.append(order.number)
        self._unread[order.request_id] -= 1
        if not self._unread[order.request_id]:
            del self._unread[order.request_id]

    def _end_holding(self, now_s: float) -> None:
        """Drop the stores of finished requests that hold blocks for too long."""
        late = {
            request_id
            for request_id, since_s in self._held.items()
            if now_s - since_s > self._patience.hold
        }
        if late:
            self._drop_stores(lambda order: order.request_id in late, "busy")

    # What the I/O process has done.

    def _take(self, completion: Completion) -> None:
        match completion:
            case FindDone():
                ticket = self._finds.pop(completion.ticket)
                self._report.found[ticket] = sum(completion.present)
            case LoadDone():
                self._take_load(completion)
            case StoreDone():
                order, lease = self._storing.pop(completion.ticket)
                skipped = next(iter(completion.skipped.values()), None)
                self._end_store(order, lease, skipped=skipped)
                self._observer.moved(stored_bytes=completion.stored_bytes)

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets
