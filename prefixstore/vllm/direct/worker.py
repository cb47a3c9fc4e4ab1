"""A worker's side of the direct path: its part of each chunk, device ↔ ring ↔ I/O process.

The model's thread calls everything here in each step, and nothing here waits for I/O or for a copy.

- **Load**: blob → the I/O process's buffer, verified → (pump thread) staging buffer → device. A load is
  reported when its copy is seen past, or when it has failed; the blocks of chunks that failed are
  reported with it, and the engine computes them.
- **Store**: once the step has computed the blocks, device → staging buffer, and the I/O process publishes
  the buffer. Stores for which no buffer is free wait for one, until a step gives their blocks to another
  request, or to another place of their own: then they are dropped, and copies under way end before the
  model's work begins, on the device. Nobody's blocks are kept for a store (``stores``).

A load that comes late reaches nothing: before it copies, the pump asks under a lock whether the chunk
is still wanted, and it is not once it was reported.

A step that failed leaves KV that is not what its tokens stand for, and later steps compute on it. Steps are
numbered, so one that did not come through is seen when the next begins, and nothing is stored any more. Where
ranks compute together, the step of one can fail while the other computes on what never came: there a copy is
published once all ranks are known to have ended its step.
"""

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefixstore.clock import Clock
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import ChunkLoad, Completion, FindDone, LoadDone, StoreDone
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
from prefixstore.vllm.direct.observer import Observer
from prefixstore.vllm.direct.pages import Pages
from prefixstore.vllm.direct.ring import Lease, StagingRing
from prefixstore.vllm.direct.stores import Stores
from prefixstore.vllm.direct.worth import LoadNotes
from prefixstore.vllm.worth import LoadMeter

if TYPE_CHECKING:
    from prefixstore.keys import Key

__all__ = ["OPEN_PATIENCE_S", "DirectWorker", "Patience"]

logger = logging.getLogger("prefixstore")

OPEN_PATIENCE_S = 5.0
"""How long the first lookups of an engine wait for its store to open: it takes a second or so, and an
engine that just came back is asked about the longest prefixes."""

CLOSING_POLL_S = 0.001
"""How often an engine that ends looks for free buffers."""


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


class DirectWorker:
    """Moves one worker's KV. For the model's thread, but ``bind`` and ``turn_off``.

    Args:
        pages: Of each KV group, by vLLM's number of it.
        is_alone: No other rank computes with this one.
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
        is_alone: bool,
    ) -> None:
        self._pages = tuple(pages)
        self._device = device
        self._ring = ring
        self._observer = observer
        self._patience = patience
        self._clock = clock
        self._is_alone = is_alone
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
        self._stores = Stores(
            pages=pages,
            device=device,
            ring=ring,
            observer=observer,
            element_bytes=element_bytes,
            next_ticket=self._next_ticket,
        )
        self._ended_step = 0  # The last that came through, as all before it did.
        self._proven_step = 0  # The same on every rank.
        self._has_failed = False
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

    def begin(self, orders: StepOrders) -> None:
        """See that the steps before came through, and let go of what this one overwrites, before its work."""
        try:
            if self._has_failed or orders.number != self._ended_step + 1:
                self.fail()
            self._proven_step = max(self._proven_step, orders.proven)
            self._stores.take(orders.late_stores, step=orders.number - 1)
            self._stores.lose(orders)
        except Exception:
            self._stores.void("error")  # What is overwritten unseen is not published.
            raise

    def fail(self) -> None:
        """Store nothing any more, since a step failed: what it left is not KV, and later steps read it."""
        self.turn_off("a step of the engine failed")
        self._has_failed = True
        self._tells_off = True  # Each time: what a step that fails reports does not arrive.
        self._stores.void("off")

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
        """Take a step's stores; the step's forward pass has been submitted, and did not fail."""
        if not self._has_failed:
            self._ended_step = orders.number
        self._report.ends_step = not orders.is_idle
        self._stores.take(orders.stores, step=orders.number)
        self._copy_stores()

    def poll(self) -> set[str]:
        """Move everything on; return the requests whose loads have ended."""
        now_s = self._clock.monotonic_s()
        self._take_completions()
        self._answer_finds(now_s)
        self._end_copies(now_s)
        self._start_loads(now_s)
        self._publish_stores()
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
        report.settled, self._stores.settled = self._stores.settled, []
        if not self._is_alone:
            report.ended = self._ended_step
        return report if report.tells else None

    @property
    def is_waiting(self) -> bool:
        """Whether requests wait for this worker."""
        return bool(self._loads or self._finds or self._finds_waiting)

    @property
    def is_storing(self) -> bool:
        """Whether stores wait for anything but the I/O process."""
        return self._stores.is_moving

    @property
    def ended_step(self) -> int:
        """The last step that came through, as all before it did."""
        return self._ended_step

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
        self._stores.abandon()
        loads, self._loads = self._loads, {}
        for load in loads.values():
            load.failed.update(block for chunk in load.order.chunks for block in chunk.blocks)
            self._end_load(load)
        return set(loads)

    def close(self, timeout_s: float, *, last: Sequence[StoreOrder] | None) -> None:
        """Publish what was offered, for a bounded time, and end the I/O process; no step follows.

        Args:
            timeout_s: How long that may take.
            last: Stores of ended requests for which no step came; None: nobody here can tell whether the KV
                cache still holds what it held, so nothing more is copied from it.
        """
        end_s = self._clock.monotonic_s() + timeout_s
        self._is_closed = True
        client = self._client
        try:
            if last is None or client is None:
                self._stores.drop("off")
            else:
                self._stores.take(last, step=self._ended_step)
            self._copy_stores()
            while self._stores.is_moving and self._clock.monotonic_s() < end_s:
                self._clock.sleep(CLOSING_POLL_S)
                self._take_completions()
                self._publish_stores()
                self._copy_stores()
        finally:
            if client is not None:
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
        if self.state == "on":
            if self._stores.copy():
                self._publish_stores()
        elif self.state != "opening":
            self._stores.drop(self.state)

    def _publish_stores(self) -> None:
        self._stores.publish(
            self._client,
            proven=self._ended_step if self._is_alone else self._proven_step,
            is_last=self._is_closed or self._off_reason is not None,
        )

    # What the I/O process has done.

    def _take_completions(self) -> None:
        if self._client is not None:
            for completion in self._client.poll():
                self._take(completion)

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
                self._stores.end(completion)

    def _pages_of(self, key: "Key") -> Pages:
        return self._pages[kv_group(key)]

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets
