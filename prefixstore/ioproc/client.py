"""The engine's side of the I/O process: non-blocking, bounded, and exact about deadlines.

Two threads of the engine's process meet here. The **caller** (vLLM's scheduler) submits jobs and
polls; none of its calls waits for I/O, a lock held during I/O, or the I/O process. The **pump** thread
moves requests, replies and payload bytes; it spends its time in system calls and ``memmove``, both
without the GIL.

How a late read can never reach a reused slot: payload bytes go file → buffer → slot, and only the pump
copies into a slot, holding ``_landing`` while it checks that the job is still open and copies. The
caller closes a job under the same lock when its deadline passes. After that the buffer of a hung read
is still lent out, but nothing leads from it to the slot any more.

Lock order: ``_landing`` is a leaf. Everything else is owned by one thread or crosses in a deque.
"""

import threading
from collections import deque
from collections.abc import Sequence

from prefixstore.clock import Clock, SystemClock
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
from prefixstore.ioproc.messages import State
from prefixstore.ioproc.pump import TICK_S, Job, Pump
from prefixstore.keys import Key

__all__ = ["IoClient"]

EXPIRY_INTERVAL_S = 0.05
"""Deadlines are seconds long; looking at them on every poll of a busy engine would be waste."""


class IoClient:
    """Drives one store in a child process. Every method is for one caller thread.

    ``close`` when done; the child notices a dead engine by itself.
    """

    def __init__(self, target: StoreTarget, limits: Limits, *, clock: Clock | None = None) -> None:
        self._limits = limits
        self._clock = clock or SystemClock()
        self._landing = threading.Lock()
        self._jobs: dict[tuple[str, int], Job] = {}
        self._finished: deque[Job] = deque()
        self._progress = threading.Event()
        self._next_expiry_s = 0.0
        self._stores_waiting = 0
        self._changes_lost = 0
        self._closed = False
        self._pump = Pump(
            target,
            limits,
            clock=self._clock,
            landing=self._landing,
            finished=self._finished,
            progress=self._progress,
        )

    # The caller's side.

    @property
    def state(self) -> State:
        """What the store can do now."""
        return self._pump.state

    @property
    def reason(self) -> str:
        """Why the store is in its state, as a sentence for people."""
        return self._pump.reason

    @property
    def ready(self) -> bool:
        """Whether a find is worth its wait: the root is open and answered lately."""
        suspended = self._clock.monotonic_s() < self._pump.suspended_until_s
        return self.state in ("on", "read_only") and not suspended

    def counters(self) -> dict[str, int]:
        """Return the store's counters, summed over all runs of the I/O process."""
        return self._pump.counters

    def find(self, ticket: int, keys: Sequence[Key], *, chained: bool) -> None:
        """Ask which keys are stored; completed by ``FindDone``."""
        job = self._submit(
            FindDone(ticket=ticket, present=[False] * len(keys), answered=False),
            keys,
            self._limits.find_deadline_s,
        )
        self._pump.find(job, chained=chained)

    def load(self, ticket: int, chunks: Sequence[ChunkLoad]) -> None:
        """Load chunks; completed by ``LoadDone`` with those that landed."""
        job = self._submit(
            LoadDone(ticket=ticket),
            [chunk.key for chunk in chunks],
            self._limits.load_deadline_s,
        )
        self._pump.load(job, chunks)

    def store(self, ticket: int, chunks: Sequence[ChunkStore]) -> bool:
        """Store chunks; completed by ``StoreDone``. False: too many wait already, nothing was taken."""
        if self._stores_waiting + len(chunks) > self._limits.stores_waiting_max:
            return False
        job = self._submit(
            StoreDone(ticket=ticket),
            [chunk.key for chunk in chunks],
            self._limits.store_deadline_s,
        )
        self._stores_waiting += len(chunks)
        self._pump.store(job, chunks)
        return True

    def touch(self, keys: Sequence[Key]) -> None:
        """Say that these keys were used just now."""
        self._pump.touch(keys)

    def poll(self) -> list[Completion]:
        """Return the jobs completed since the last call, each exactly once."""
        if not self._jobs:
            return []
        completions = self._take_finished()
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_expiry_s:
            self._next_expiry_s = now_s + EXPIRY_INTERVAL_S
            completions += self._expire(now_s)
        return completions

    def take_changes(self) -> tuple[list[ChunkChange], int]:
        """Return what was published or went since the last call, in order, and how much was forgotten.

        Only with ``Limits.changes_max``. A chunk whose job was given up is told of, too, if it was
        published after all.
        """
        changes = self._pump.changes
        lost_before, self._changes_lost = self._changes_lost, self._pump.changes_lost
        taken = [changes.popleft() for _ in range(len(changes))]
        return taken, self._changes_lost - lost_before

    @property
    def busy(self) -> bool:
        """Whether jobs are outstanding."""
        return bool(self._jobs)

    def drain(self, timeout_s: float) -> list[Completion]:
        """Wait for all jobs, at most ``timeout_s``; then give up on the rest.

        When it returns, nothing of ours reads or writes the caller's memory.
        """
        end_s = self._clock.monotonic_s() + timeout_s
        completions: list[Completion] = []
        while self._jobs and self._clock.monotonic_s() < end_s:
            self._progress.wait(timeout=min(TICK_S, timeout_s))
            self._progress.clear()
            completions += self.poll()
        return completions + [self._give_up(job) for job in list(self._jobs.values())]

    def close(self, timeout_s: float) -> None:
        """Let queued stores finish for up to ``timeout_s``, then end the process and the pump."""
        if self._closed:
            return
        self._closed = True
        self._pump.close(timeout_s)
        for job in list(self._jobs.values()):
            self._give_up(job)

    def _submit(self, done: Completion, keys: Sequence[Key], patience_s: float) -> Job:
        now_s = self._clock.monotonic_s()
        job = Job(
            done=done,
            waiting=1 if isinstance(done, FindDone) else len(keys),
            submitted_s=now_s,
            patience_s=patience_s,
            keys=keys,
        )
        identity = (type(done).__name__, done.ticket)
        assert identity not in self._jobs, f"ticket {done.ticket} is outstanding already"
        self._jobs[identity] = job
        return job

    def _take_finished(self) -> list[Completion]:
        completions = []
        while self._finished:
            job = self._finished.popleft()
            if self._forget(job):
                completions.append(job.done)
        return completions

    def _expire(self, now_s: float) -> list[Completion]:
        """Close the jobs that have waited too long since anything of their kind moved."""
        expired = [
            job
            for job in self._jobs.values()
            if now_s - max(job.submitted_s, self._pump.progress_s(job.done)) > job.patience_s
        ]
        if expired:
            self._pump.suspended_until_s = now_s + self._limits.breaker_s
        return [self._give_up(job) for job in expired]

    def _give_up(self, job: Job) -> Completion:
        with self._landing:
            job.open = False
        done = job.done
        if isinstance(done, LoadDone):
            landed = set(done.landed)
            for key in job.keys:
                if key not in landed:
                    done.missed.setdefault(key, "timeout")
        elif isinstance(done, StoreDone):
            ended = {*done.stored, *done.existed}
            for key in job.keys:
                if key not in ended:
                    done.skipped.setdefault(key, "timeout")
        self._forget(job)
        return done

    def _forget(self, job: Job) -> bool:
        identity = (type(job.done).__name__, job.done.ticket)
        if self._jobs.get(identity) is not job:
            return False
        del self._jobs[identity]
        if isinstance(job.done, StoreDone):
            self._stores_waiting -= len(job.keys)
        if not isinstance(job.done, FindDone):
            ended_s = self._clock.monotonic_s() if job.ended_s is None else job.ended_s
            job.done.elapsed_s = ended_s - job.submitted_s
        return True
