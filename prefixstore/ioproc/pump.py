"""The pump: one thread that runs the I/O process and moves everything to and from it.

It owns the child, its stream, its buffers and every operation in flight. The caller's side
(``prefixstore.ioproc.client``) reaches it through ``command`` and through values that are only ever
replaced whole. A child that dies, hangs or cannot be started costs the operations in flight, which are
answered as misses, and is replaced after a growing delay.
"""

import contextlib
import logging
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.ioproc.channels import Channel
from prefixstore.ioproc.jobs import (
    ChunkChange,
    ChunkLoad,
    ChunkStore,
    Completion,
    FindDone,
    Limits,
    LoadDone,
    StoreDone,
    StoreTarget,
)
from prefixstore.ioproc.messages import (
    Configure,
    Counters,
    Find,
    Found,
    Gone,
    Load,
    Loaded,
    Opened,
    Reply,
    State,
    Stop,
    Store,
    Stored,
    Touch,
)
from prefixstore.ioproc.process import IoProcess
from prefixstore.keys import Key
from prefixstore.tree.buffer import Buffer

__all__ = ["Job", "Pump"]

logger = logging.getLogger(__name__)

TICK_S = 0.25
"""How often the pump looks at its child's age and pulse when nothing happens."""
RESTART_FIRST_S = 0.5
RESTART_LONGEST_S = 60.0
"""A child that dies at once is started again ever more rarely: at worst once a minute."""
LOAD_BUFFERS_RESERVED = 2
"""Buffers that stores leave free, so that a full store queue never delays a waiting request."""
KILL_WAIT_S = 1.0
EXIT_WAIT_S = 0.5
"""A process closes its stream some moments before its end can be told."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A submitted job; ``open`` and ``done`` change under the landing lock only.

    Attributes:
        done: The completion, filled as chunks end.
        waiting: How many of its operations have not ended. Owned by the pump.
        keys: Its keys, in the order submitted.
        submitted_s: When, on the monotonic clock.
        patience_s: How long it may see no progress.
        open: False once the caller has given it up; nothing is copied for it any more.
        ended_s: When its last operation ended, however late the caller asks.
    """

    done: Completion
    waiting: int
    keys: Sequence[Key]
    submitted_s: float
    patience_s: float
    open: bool = True
    ended_s: float | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class _Operation:
    """One request that the I/O process has not answered yet."""

    job: Job
    chunk: ChunkLoad | ChunkStore | None
    buffer: int | None
    sent_s: float


class Pump:
    """Runs the I/O process on a thread of its own; ``command`` may be called from any thread."""

    def __init__(
        self,
        target: StoreTarget,
        limits: Limits,
        *,
        clock: Clock,
        landing: threading.Lock,
        finished: deque[Job],
        progress: threading.Event,
    ) -> None:
        self._target = target
        self._limits = limits
        self._clock = clock
        self._landing = landing
        self._finished = finished
        self._progress = progress
        # Read by the caller's side, replaced whole here.
        self.state: State = "opening"
        self.reason = "the I/O process is starting"
        self.suspended_until_s = 0.0
        self.load_progress_s = 0.0
        self.store_progress_s = 0.0
        self.counters: dict[str, int] = {}
        self.changes_lost = 0
        # Filled here, emptied by the caller's side.
        self.changes: deque[ChunkChange] = deque(maxlen=limits.changes_max)
        # Owned by the pump's thread.
        self._process: IoProcess | None = None
        self._stuck: list[IoProcess] = []
        self._operations: dict[int, _Operation] = {}
        self._next_ticket = 0
        self._free_buffers: list[int] = []
        self._loads: deque[tuple[Job, ChunkLoad]] = deque()
        self._stores: deque[tuple[Job, ChunkStore]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._counters_before: dict[str, int] = {}
        self._restart_at_s = 0.0
        self._restart_delay_s = RESTART_FIRST_S
        self._discard_index = False
        self._root_was_there = False
        self._closing = False
        self._watches_writes = False
        # Held while ``_wake`` is written to or closed: a number must never come to mean another file.
        self._waking = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="prefixstore-pump", daemon=True)
        self._thread.start()

    # Called by the caller's side: each hands its work to the pump's thread.

    def find(self, job: Job, *, chained: bool) -> None:
        """Ask which of the job's keys are stored."""
        self._post(lambda: self._send_find(job, chained=chained))

    def load(self, job: Job, chunks: Sequence[ChunkLoad]) -> None:
        """Load chunks as buffers become free."""
        self._post(lambda: self._loads.extend((job, chunk) for chunk in chunks))

    def store(self, job: Job, chunks: Sequence[ChunkStore]) -> None:
        """Store chunks as buffers become free."""
        self._post(lambda: self._stores.extend((job, chunk) for chunk in chunks))

    def touch(self, keys: Sequence[Key]) -> None:
        """Pass on that keys were used; dropped while there is no store."""
        self._post(lambda: self._send_touch(keys))

    def close(self, timeout_s: float) -> None:
        """End when all work has ended, or in ``timeout_s``; kill the child if it takes longer."""
        self._post(self._start_closing)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._post(self._abandon_work)
            self._thread.join(timeout_s)

    def progress_s(self, done: Completion) -> float:
        """When something of this kind last moved, on the monotonic clock."""
        if isinstance(done, LoadDone):
            return self.load_progress_s
        return self.store_progress_s if isinstance(done, StoreDone) else 0.0

    def _post(self, work: Callable[[], None]) -> None:
        with self._waking:
            if self._wake >= 0:
                self._work.append(work)
                os.eventfd_write(self._wake, 1)

    # The pump's thread.

    def _run(self) -> None:
        try:
            while not (self._closing and self._idle()):
                try:
                    self._turn()
                except Exception as error:
                    # A bug of ours: what is in flight becomes misses, and the engine serves on.
                    logger.exception("the pump failed and starts over")
                    self._lose_process(f"the pump failed: {error!r}")
        finally:
            self._leave()

    def _turn(self) -> None:
        self._keep_a_process()
        ready = self._await_events()
        while self._work:
            self._work.popleft()()
        self._receive(ready)
        self._lend_buffers()
        self._watch_for_a_hang()

    def _idle(self) -> bool:
        return not (self._operations or self._loads or self._stores or self._work)

    def _keep_a_process(self) -> None:
        """Start the child if there is none and it is time."""
        now_s = self._clock.monotonic_s()
        if self._process is not None or self._closing or now_s < self._restart_at_s:
            return
        self._stuck = [process for process in self._stuck if not process.reaped()]
        if len(self._stuck) >= self._limits.processes_stuck_max:
            self._enter("off", f"{len(self._stuck)} I/O processes hang on {self._target.root}")
            self._delay_restart(now_s)
            return
        try:
            process = IoProcess.start(
                buffer_count=self._limits.buffer_count, buffer_bytes=self._limits.buffer_bytes
            )
        except UnavailableError as error:
            self._enter("off", str(error))
            self._delay_restart(now_s)
            return
        self._process = process
        self._free_buffers = list(range(self._limits.buffer_count))
        for channel in process.channels:
            self._selector.register(channel.socket, selectors.EVENT_READ, channel)
        process.send(
            Configure(
                root=self._target.root,
                namespace=self._target.namespace,
                options=self._target.options,
                buffer_count=self._limits.buffer_count,
                buffer_bytes=self._limits.buffer_bytes,
                load_threads=self._limits.load_threads,
                store_threads=self._limits.store_threads,
                discard_index=self._discard_index,
                create=not self._root_was_there,
            )
        )

    def _delay_restart(self, now_s: float) -> None:
        self._restart_at_s = now_s + self._restart_delay_s
        self._restart_delay_s = min(2 * self._restart_delay_s, RESTART_LONGEST_S)

    def _await_events(self) -> list[Channel]:
        """Sleep until there is something to do; return the channels on which replies wait."""
        process = self._process
        if process is not None and (process.wants_to_send or self._watches_writes):
            self._watches_writes = process.wants_to_send
            for channel in process.channels:
                writes = selectors.EVENT_WRITE if channel.outbox_bytes else 0
                self._selector.modify(channel.socket, selectors.EVENT_READ | writes, channel)
        ready = []
        for key, events in self._selector.select(TICK_S):
            channel = key.data
            if channel is None:
                os.eventfd_read(self._wake)
                continue
            if events & selectors.EVENT_WRITE:
                channel.flush()
            if events & selectors.EVENT_READ:
                ready.append(channel)
        return ready

    def _send_find(self, job: Job, *, chained: bool) -> None:
        process = self._process
        if process is None or self.state not in ("on", "read_only"):
            self._end(job)
            return
        ticket = self._begin(job, chunk=None, buffer=None)
        deadline_s = self._clock.monotonic_s() + job.patience_s
        keys = [bytes(key) for key in job.keys]
        process.send(Find(ticket=ticket, keys=keys, chained=chained, deadline_s=deadline_s))

    def _send_touch(self, keys: Sequence[Key]) -> None:
        if self._process is not None and self.state == "on":
            self._process.send(Touch(keys=[bytes(key) for key in keys]))

    def _begin(self, job: Job, *, chunk: ChunkLoad | ChunkStore | None, buffer: int | None) -> int:
        self._next_ticket += 1
        self._operations[self._next_ticket] = _Operation(
            job=job, chunk=chunk, buffer=buffer, sent_s=self._clock.monotonic_s()
        )
        return self._next_ticket

    def _lend_buffers(self) -> None:
        """Start the loads, then the stores, that there are free buffers for."""
        usable = self._process is not None and self.state in ("on", "read_only")
        while self._loads and (self._free_buffers or not usable):
            job, load = self._loads.popleft()
            if usable and job.open:
                self._send_load(job, load)
            else:
                self._end_load(job, load, reason="off" if job.open else "timeout")
        reserved = min(LOAD_BUFFERS_RESERVED, self._limits.buffer_count - 1)
        while self._stores and (len(self._free_buffers) > reserved or not usable):
            job, store = self._stores.popleft()
            if not usable or not job.open:
                self._end_store(job, store, reason="off" if job.open else "timeout")
            elif self.state == "read_only":
                self._end_store(job, store, reason="read_only")
            else:
                self._send_store(job, store)

    def _send_load(self, job: Job, load: ChunkLoad) -> None:
        assert self._process is not None, "checked by the caller"
        number = self._free_buffers.pop()
        ticket = self._begin(job, chunk=load, buffer=number)
        self._process.send(
            Load(
                ticket=ticket,
                key=load.key,
                buffer=number,
                raw_bytes=load.raw_bytes,
                deadline_s=self._clock.monotonic_s() + job.patience_s,
            )
        )

    def _send_store(self, job: Job, store: ChunkStore) -> None:
        assert self._process is not None, "checked by the caller"
        number = self._free_buffers.pop()
        refused = self._fill(job, store, self._process.arena.buffer(number))
        if refused is not None:
            self._free_buffers.append(number)
            self._end_store(job, store, reason=refused)
            return
        ticket = self._begin(job, chunk=store, buffer=number)
        self._process.send(
            Store(
                ticket=ticket,
                key=store.key,
                parent=store.parent,
                end_token=store.end_token,
                element_bytes=store.element_bytes,
                buffer=number,
                raw_bytes=store.raw_bytes,
            )
        )

    def _fill(self, job: Job, store: ChunkStore, buffer: Buffer) -> str | None:
        """Copy a chunk into a buffer, if its job still wants that; return why it is not there."""
        try:
            with self._landing:
                if not job.open:
                    return "timeout"
                store.fill(buffer.payload(store.raw_bytes))
        except Exception:
            # In no queue now, it would keep its job waiting for ever.
            logger.exception("a chunk could not be copied for its store")
            return "error"
        return None

    def _receive(self, ready: Sequence[Channel]) -> None:
        for channel in ready:
            try:
                replies, is_open = channel.receive()
            except InvalidError as error:
                self._lose_process(f"the I/O process spoke nonsense: {error}")
                return
            for reply in replies:
                self._take_reply(reply)
            if not is_open:
                self._lose_process("the I/O process died", exit_wait_s=EXIT_WAIT_S)
                return

    def _take_reply(self, reply: Reply) -> None:
        match reply:
            case Opened():
                self._enter(reply.state, reply.reason)
                if reply.state in ("on", "read_only"):
                    self._restart_delay_s = RESTART_FIRST_S
                    self._discard_index = False
                    self._root_was_there = True
            case Gone():
                self._note_changes([Key(key) for key in reply.keys], gone=True)
            case Counters():
                before = self._counters_before
                self.counters = {
                    name: value + before.get(name, 0) for name, value in reply.values.items()
                }
            case _:
                operation = self._operations.pop(reply.ticket)
                self.suspended_until_s = 0.0
                self._take_answer(operation, reply)

    def _take_answer(self, operation: _Operation, reply: Found | Loaded | Stored) -> None:
        job, chunk, now_s = operation.job, operation.chunk, self._clock.monotonic_s()
        if isinstance(reply, Found):
            with self._landing:
                if job.open and isinstance(job.done, FindDone):
                    job.done.present = [byte != 0 for byte in reply.present]
                    job.done.answered = True
            self._end(job)
        elif isinstance(chunk, ChunkLoad) and isinstance(reply, Loaded):
            self.load_progress_s = now_s
            self._end_load(job, chunk, reason=reply.reason, operation=operation, reply=reply)
        elif isinstance(chunk, ChunkStore) and isinstance(reply, Stored):
            self.store_progress_s = now_s
            self._end_store(job, chunk, reason=reply.reason, reply=reply)
        if operation.buffer is not None:
            self._free_buffers.append(operation.buffer)

    def _end_load(
        self,
        job: Job,
        chunk: ChunkLoad,
        *,
        reason: str | None,
        operation: _Operation | None = None,
        reply: Loaded | None = None,
    ) -> None:
        """Land a chunk if its job still wants it, and account for it."""
        if reason is None and operation is not None and reply is not None:
            reason = self._land(job, chunk, operation, reply)
        if reason is not None:
            with self._landing:
                if job.open and isinstance(job.done, LoadDone):
                    job.done.missed[chunk.key] = reason
        self._end(job)

    def _land(self, job: Job, chunk: ChunkLoad, operation: _Operation, reply: Loaded) -> str | None:
        """Copy a chunk to where it is wanted, if it still is; return why it is not there."""
        assert self._process is not None, "a reply came from it"
        assert operation.buffer is not None, "a load is sent with a buffer"
        payload = self._process.arena.buffer(operation.buffer).payload(chunk.raw_bytes)
        try:
            with self._landing:
                if job.open and isinstance(job.done, LoadDone):
                    chunk.land(payload)
                    job.done.landed.append(chunk.key)
                    job.done.landed_bytes += chunk.raw_bytes
                    job.done.read_bytes += reply.stored_bytes
        except Exception:
            logger.exception("a loaded chunk could not be landed")
            return "error"
        return None

    def _end_store(
        self, job: Job, chunk: ChunkStore, *, reason: str | None, reply: Stored | None = None
    ) -> None:
        """Account for a chunk that was stored, existed or was skipped."""
        if reply is not None and reason is None:
            self._note_changes([chunk.key], gone=False)
        with self._landing:
            if job.open and isinstance(job.done, StoreDone):
                if reason is not None or reply is None:
                    job.done.skipped[chunk.key] = reason or "error"
                elif reply.existed:
                    job.done.existed.append(chunk.key)
                else:
                    job.done.stored.append(chunk.key)
                    job.done.stored_bytes += reply.stored_bytes
        self._end(job)

    def _note_changes(self, keys: Sequence[Key], *, gone: bool) -> None:
        """Keep changes for the caller, if it asks for them at all."""
        if self._limits.changes_max:
            free = self._limits.changes_max - len(self.changes)
            self.changes_lost += max(0, len(keys) - free)
            self.changes.extend(ChunkChange(key, gone) for key in keys)

    def _end(self, job: Job) -> None:
        """One operation of the job has ended; with the last, hand it to the caller."""
        job.waiting -= 1
        if job.waiting == 0:
            job.ended_s = self._clock.monotonic_s()
            self._finished.append(job)
            self._progress.set()

    def _watch_for_a_hang(self) -> None:
        """Replace a child whose oldest operation says that a mount hangs, or that stopped reading."""
        if self._process is None:
            return
        oldest = next(iter(self._operations.values()), None)
        age_s = self._clock.monotonic_s() - oldest.sent_s if oldest is not None else 0.0
        if age_s > self._limits.hang_s:
            self._lose_process(f"an operation on {self._target.root} hangs for {age_s:.0f} s")
        elif self._process.overflowed:
            self._lose_process("the I/O process stopped reading")

    def _lose_process(self, why: str, *, exit_wait_s: float = 0.0) -> None:
        """Kill the child, answer everything in flight with a miss, plan the next start.

        Args:
            why: A sentence for people.
            exit_wait_s: How long a child that ends by itself may take, to tell how it died.
        """
        process, self._process = self._process, None
        if process is not None:
            for channel in process.channels:
                # A failure may have come before it was registered.
                with contextlib.suppress(KeyError):
                    self._selector.unregister(channel.socket)
            self._discard_index = process.wait(exit_wait_s) and process.died_of_damage()
            process.kill()
            if not process.wait(KILL_WAIT_S):
                self._stuck.append(process)
        self._enter("off", why)
        self._counters_before = self.counters
        operations, self._operations = self._operations, {}
        for operation in operations.values():
            if isinstance(operation.chunk, ChunkLoad):
                self._end_load(operation.job, operation.chunk, reason="io_process")
            elif isinstance(operation.chunk, ChunkStore):
                self._end_store(operation.job, operation.chunk, reason="io_process")
            else:
                self._end(operation.job)
        self._delay_restart(self._clock.monotonic_s())

    def _enter(self, state: State, reason: str) -> None:
        if state != self.state:
            level = logging.INFO if state in ("on", "opening") else logging.WARNING
            logger.log(level, "store is %s: %s", state, reason)
        self.reason = reason
        self.state = state

    def _start_closing(self) -> None:
        self._closing = True
        if self._process is None or self.state not in ("on", "read_only"):
            self._abandon_work()

    def _abandon_work(self) -> None:
        """Answer all that waits or flies with a miss, so that the thread can end."""
        self._closing = True
        if self._process is not None and self._operations:
            self._lose_process("it did not end in time")
        self._enter("off", "closed")
        self._lend_buffers()

    def _leave(self) -> None:
        """The thread's last act: let the child finish its store, then see it off."""
        try:
            if self._process is not None:
                self._process.send(Stop())
                if not self._process.wait(KILL_WAIT_S + self._limits.hang_s):
                    self._enter("off", "the I/O process did not leave and was killed")
                self._process.kill()
                self._process.wait(KILL_WAIT_S)
        finally:
            # However long that took: whoever closes may have stopped waiting.
            self._selector.close()
            with self._waking:
                os.close(self._wake)
                self._wake = -1
