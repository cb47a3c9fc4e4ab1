"""A worker's side of the direct path: its part of each chunk, device ↔ ring ↔ I/O process.

The model's thread calls everything here in each step, and nothing here waits for I/O or for a copy.

- **Load**: blob → the I/O process's buffer, verified → (pump thread) staging buffer → device. A load is
  reported when its copy is seen past, or when it has failed; the blocks of chunks that failed are
  reported with it, and the engine computes them.
- **Store**: once the step has computed the blocks, device → staging buffer, and the I/O process publishes
  the buffer. Stores for which no buffer is free wait for one, until a step gives their blocks to another
  request, or to another place of their own: then they are dropped, and copies under way end before the
  model's work begins, on the device. Nobody's blocks are kept for a store.

A load that comes late reaches nothing: before it copies, the pump asks under a lock whether the chunk
is still wanted, and it is not once it was reported.
"""

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
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
from prefixstore.keys import kv_group
from prefixstore.vllm.direct.device import Device, Mark
from prefixstore.vllm.direct.finds import Finds
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
from prefixstore.vllm.direct.worth import LoadNotes
from prefixstore.vllm.worth import LoadMeter

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
"""Chunks that wait for a buffer while their blocks are theirs: half a kilobyte of books each."""

CLOSING_POLL_S = 0.001
"""How often an engine that ends looks for free buffers."""


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
    """

    load: float = 10.0


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
    """Moves one worker's KV. For the model's thread, but ``bind`` and ``turn_off``.

    Args:
        pages: Of each KV group, by vLLM's number of it.
    """

    def __init__(
        self,
        *,
        pages: Sequence[Pages],
        device: Device,
        ring: StagingRing,
        observer: Observer,
        patience: Patience,
        clock: Clock,
        element_bytes: int,
    ) -> None:
        self._pages = tuple(pages)
        self._device = device
        self._ring = ring
        self._observer = observer
        self._patience = patience
        self._clock = clock
        self._element_bytes = element_bytes
        self._client: IoClient | None = None
        self._off_reason: str | None = None
        self._tells_off = False  # The scheduler's side is to be told.
        self._is_closed = False
        self._landing = threading.Lock()
        self._tickets = 0
        self._started_s = clock.monotonic_s()
        self._finds_waiting: deque[FindOrder] = deque()
        self._finds = Finds(self._next_ticket)
        self._load_notes = LoadNotes()
        self._load_meter = LoadMeter(self._load_notes)
        self._loads: dict[str, _Load] = {}
        self._chunks: dict[int, _Chunk] = {}
        self._stores_waiting: deque[StoreOrder] = deque()
        self._batches: deque[_Batch] = deque()
        self._storing: dict[int, tuple[StoreOrder, Lease]] = {}
        self._keys_storing: set[Key] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._report = RankReport()

    def bind(self, client: IoClient) -> None:
        """Serve from a store: from now on lookups may find something."""
        self._client = client
        if self._is_closed:
            client.close(0.0)

    def turn_off(self, reason: str) -> None:
        """Neither find nor store any more; loads under way still end."""
        if self._off_reason is None:
            logger.warning("store is off: %s", reason)
            self._off_reason = reason
            self._tells_off = True

    @property
    def state(self) -> str:
        """What the store can do now, as metrics tell it."""
        if self._off_reason is not None:
            return "off"
        return self._client.state if self._client is not None else "opening"

    # The steps of vLLM, in this order.

    def lose_blocks(self, orders: StepOrders) -> None:
        """Read no more for stores whose blocks this step overwrites; before its work is submitted."""
        lost = set(orders.overwritten)
        if not lost and not orders.are_all_overwritten:
            return

        def is_lost(order: StoreOrder) -> bool:
            return orders.are_all_overwritten or order.number in lost

        self._drop_stores(is_lost, "overwritten")
        for batch in [*self._batches]:
            if any(is_lost(order) for order, _ in batch.stores):
                try:
                    self._device.hold_model(batch.mark)
                except Exception:
                    # What is still copied may be another's: none of it is published.
                    self._batches.remove(batch)
                    self._fail_batch(batch.stores)
                    raise

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
        self._report.ends_step = not orders.is_idle
        for order in orders.stores:
            if order.key in self._keys_storing or len(self._stores_waiting) >= STORES_WAITING_MAX:
                self._settle(order)
            else:
                self._keys_storing.add(order.key)
                self._stores_waiting.append(order)
        self._copy_stores()

    def poll(self) -> set[str]:
        """Move everything on; return the requests whose loads have ended."""
        now_s = self._clock.monotonic_s()
        if self._client is not None:
            for completion in self._client.poll():
                self._take(completion)
        self._answer_finds(now_s)
        self._end_copies(now_s)
        self._start_loads(now_s)
        self._end_batches()
        self._copy_stores()
        loaded = {
            request_id
            for request_id, load in self._loads.items()
            if not load.under_way and not load.queue
        }
        for request_id in loaded:
            self._end_load(self._loads.pop(request_id))
        return loaded

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks of ended loads that hold nothing, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Return the requests of whose ended loads nothing may be used, once."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_report(self) -> RankReport | None:
        """Return what the scheduler's side is to know, once."""
        report, self._report = self._report, RankReport()
        report.found, self._finds.answers = self._finds.answers, {}
        report.is_off, self._tells_off = self._tells_off, False
        report.loads = self._load_notes.take()
        return report if report.tells else None

    @property
    def is_waiting(self) -> bool:
        """Whether requests wait for this worker."""
        return bool(self._loads or self._finds or self._finds_waiting)

    @property
    def is_storing(self) -> bool:
        """Whether stores wait for a buffer, or for the end of their copy."""
        return bool(self._stores_waiting or self._batches)

    def abandon(self) -> set[str]:
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
        loads, self._loads = self._loads, {}
        for load in loads.values():
            load.failed.update(block for chunk in load.order.chunks for block in chunk.blocks)
            self._end_load(load)
        return set(loads)

    def close(self, timeout_s: float) -> None:
        """Publish what was offered, for a bounded time, and end the I/O process; no step follows."""
        end_s = self._clock.monotonic_s() + timeout_s
        self._is_closed = True
        self._copy_stores()
        while self._stores_waiting and self._clock.monotonic_s() < end_s:
            self._clock.sleep(CLOSING_POLL_S)
            self._end_batches()
            self._copy_stores()
        self._end_batches()
        if (client := self._client) is not None:
            client.close(max(0.0, end_s - self._clock.monotonic_s()))

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
                self._finds.refuse(order)
            else:
                self._finds.start(order, client)

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

    def _end_load(self, load: _Load) -> None:
        if load.failed and load.order.is_whole:
            self._failed_requests.add(load.order.request_id)
        else:
            self._failed_blocks |= load.failed

    def _start_load(self, load: _Load, chunk: LoadChunk, lease: Lease) -> None:
        assert self._client is not None, "the state says so"
        moving = _Chunk(load=load, chunk=chunk, lease=lease)
        ticket = self._next_ticket()
        self._chunks[ticket] = moving
        load.under_way += 1
        self._load_meter.begin(ticket, now_s=self._clock.monotonic_s())
        self._client.load(
            ticket,
            [
                ChunkLoad(
                    key=chunk.key,
                    raw_bytes=self._pages_of(chunk.key).payload_bytes,
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
                pages = self._pages_of(moving.chunk.key)
                source = ctypes.addressof(ctypes.c_char.from_buffer(payload))
                ctypes.memmove(moving.lease.address, source, pages.payload_bytes)
                copies = pages.copies(
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
        chosen: list[tuple[StoreOrder, Lease]] = []
        while self._stores_waiting and (lease := self._lease_for_store()) is not None:
            chosen.append((self._stores_waiting.popleft(), lease))
        if chosen:
            self._copy_batch(chosen)
            self._end_batches()

    def _lease_for_store(self) -> Lease | None:
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
            self._fail_batch(stores)
            raise
        self._batches.append(_Batch(stores, mark))

    def _fail_batch(self, stores: list[tuple[StoreOrder, Lease]]) -> None:
        # If a part of it is under way, it ends before the buffers are another's.
        with contextlib.suppress(Exception):
            self._device.finish()
        for order, lease in stores:
            self._settle(order)
            self._end_store(order, lease, skipped="error")

    def _end_batches(self) -> None:
        """Hand the buffers of finished copies to the I/O process; their blocks are free."""
        while self._batches and self._device.is_past(self._batches[0].mark):
            stores = self._batches.popleft().stores
            for order, _ in stores:
                self._settle(order)
            for order, lease in stores:
                try:
                    self._submit_store(order, lease)
                except Exception:
                    logger.exception("a chunk could not be handed to the I/O process")
                    self._end_store(order, lease, skipped="error")

    def _submit_store(self, order: StoreOrder, lease: Lease) -> None:
        payload_bytes = self._pages_of(order.key).payload_bytes

        def fill(payload: memoryview) -> None:
            target = ctypes.addressof(ctypes.c_char.from_buffer(payload))
            ctypes.memmove(target, lease.address, payload_bytes)
            lease.release()

        assert self._client is not None, "a store is copied when there is one"
        ticket = self._next_ticket()
        chunk = ChunkStore(
            key=order.key,
            parent=order.parent,
            end_token=order.end_token,
            element_bytes=self._element_bytes,
            raw_bytes=payload_bytes,
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

    # What the I/O process has done.

    def _take(self, completion: Completion) -> None:
        match completion:
            case FindDone():
                assert self._client is not None, "it has answered"
                self._finds.take(completion, self._client)
            case LoadDone():
                self._load_meter.end(
                    completion.ticket,
                    landed_bytes=completion.landed_bytes,
                    elapsed_s=completion.elapsed_s,
                )
                self._take_load(completion)
            case StoreDone():
                order, lease = self._storing.pop(completion.ticket)
                skipped = next(iter(completion.skipped.values()), None)
                self._end_store(order, lease, skipped=skipped)
                self._observer.moved(stored_bytes=completion.stored_bytes)

    def _pages_of(self, key: "Key") -> Pages:
        return self._pages[kv_group(key)]

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets
