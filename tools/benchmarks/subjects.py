"""What is measured: things that move chunks between slots and files, all driven in one way.

A slot is a chunk's place in the memory of vLLM's CPU tier. A job is the load or store of some chunks under
one ticket. A subject takes jobs without blocking and is asked, as vLLM's scheduler asks its tiers, which
have ended.
"""

import ctypes
import logging
import mmap
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import ChunkLoad, ChunkStore, LoadDone, StoreDone, StoreTarget
from prefixstore.keys import Key
from prefixstore.store import Chunk, Loaded, PrefixStore
from prefixstore.tree.buffer import Buffer
from prefixstore.vllm.options import TierOptions

__all__ = ["FsTier", "IoProcess", "Slots", "Subject", "Threads", "drive"]

POLL_S = 100e-6
"""How long the driver sleeps when nothing has ended. An engine polls once a step, which is longer;
shorter keeps the driver from being what is measured."""
OPEN_S = 30.0
MADV_POPULATE_WRITE = 23
"""Linux 5.14; the mmap module of Python 3.11 has no name for it."""
STAMP_BYTES = 36
FIELDS = {"benchmark": "io"}


class Slots:
    """Page-aligned memory for ``count`` chunks, made as vLLM's CPU tier is and filled with noise.

    Attributes:
        view: Rows of slots, as vLLM hands it to a tier.
    """

    def __init__(self, *, count: int, slot_bytes: int) -> None:
        self.count, self.slot_bytes = count, slot_bytes
        self._memory = mmap.mmap(-1, count * slot_bytes, flags=mmap.MAP_SHARED)
        # At once and in order, so that the pages of a slot are neighbours where memory is not yet in
        # pieces: a disk is given fewer and longer runs, and some are twice as fast for it.
        self._memory.madvise(MADV_POPULATE_WRITE)
        noise = os.urandom(slot_bytes)
        self._flat = memoryview(self._memory)
        for slot in range(count):
            self.row(slot)[:] = noise
        self.view = self._flat.cast("B", shape=(count, slot_bytes))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def row(self, slot: int) -> memoryview:
        """Return a slot's memory."""
        return self._flat[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def copy_to(self, slot: int, payload: memoryview) -> None:
        """Copy a payload into a slot, without the GIL."""
        source = ctypes.addressof(ctypes.c_char.from_buffer(payload))
        ctypes.memmove(self._address + slot * self.slot_bytes, source, self.slot_bytes)

    def copy_from(self, slot: int, payload: memoryview) -> None:
        """Copy a slot into a payload, without the GIL."""
        target = ctypes.addressof(ctypes.c_char.from_buffer(payload))
        ctypes.memmove(target, self._address + slot * self.slot_bytes, self.slot_bytes)

    def stamp(self, slot: int, key: Key) -> None:
        """Make a slot's content that of ``key`` alone."""
        self.row(slot)[:STAMP_BYTES] = key

    def is_stamped(self, slot: int, key: Key) -> bool:
        """Whether a slot holds what was stored under ``key``."""
        return self.row(slot)[:STAMP_BYTES] == key


Job = Sequence[tuple[Key, int]]
"""Keys and their slots."""


class Subject(ABC):
    """Moves chunks; every method is for one thread and returns at once."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @abstractmethod
    def store(self, ticket: int, chunks: Job) -> None:
        """Begin to store slots."""

    @abstractmethod
    def load(self, ticket: int, chunks: Job) -> None:
        """Begin to load into slots."""

    @abstractmethod
    def poll(self) -> list[int]:
        """Return the tickets that have ended; raises if one failed."""

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes."""


class IoProcess(Subject):
    """Ours as an engine uses it: the I/O process, its buffers, and copies between those and slots."""

    def __init__(self, slots: Slots, directory: Path, options: TierOptions) -> None:
        super().__init__(slots)
        config = options.store_config(index_dir=str(directory / "index"))
        self._client = IoClient(
            StoreTarget(
                root=str(directory / "root"),
                namespace=msgspec.json.encode(FIELDS),
                options=msgspec.json.encode(config),
            ),
            options.limits(slots.slot_bytes),
        )
        end_s = time.monotonic() + OPEN_S
        while not self._client.ready:
            assert time.monotonic() < end_s, self._client.reason
            time.sleep(0.01)

    def store(self, ticket: int, chunks: Job) -> None:
        """Begin to store slots."""
        copy_from = self.slots.copy_from
        stores = [
            ChunkStore(
                key=key,
                parent=None,
                end_token=16,
                element_bytes=2,
                raw_bytes=self.slots.slot_bytes,
                fill=partial(copy_from, slot),
            )
            for key, slot in chunks
        ]
        assert self._client.store(ticket, stores), "the store was refused"

    def load(self, ticket: int, chunks: Job) -> None:
        """Begin to load into slots."""
        copy_to, size = self.slots.copy_to, self.slots.slot_bytes
        loads = [
            ChunkLoad(key=key, raw_bytes=size, land=partial(copy_to, slot)) for key, slot in chunks
        ]
        self._client.load(ticket, loads)

    def poll(self) -> list[int]:
        """Return the tickets that have ended."""
        tickets = []
        for done in self._client.poll():
            assert isinstance(done, LoadDone | StoreDone), done
            lost = done.missed if isinstance(done, LoadDone) else (done.skipped, done.existed)
            assert not any(lost), done
            tickets.append(done.ticket)
        return tickets

    def close(self) -> None:
        """End the I/O process."""
        self._client.close(OPEN_S)


class Threads(Subject):
    """Ours in the caller's process: a ``PrefixStore`` and threads that call it."""

    def __init__(
        self, slots: Slots, directory: Path, options: TierOptions, *, threads: int
    ) -> None:
        super().__init__(slots)
        config = options.store_config(index_dir=str(directory / "index"))
        self._store = PrefixStore.open(str(directory / "root"), namespace=FIELDS, config=config)
        self._queue: queue.SimpleQueue[tuple[bool, int, Key, int] | None] = queue.SimpleQueue()
        self._waiting: dict[int, int] = {}
        self._finished: deque[tuple[int, str]] = deque()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        buffer = Buffer.allocate(self.slots.slot_bytes)
        while (work := self._queue.get()) is not None:
            is_store, ticket, key, slot = work
            error = (
                self._store_one(key, slot, buffer)
                if is_store
                else self._load_one(key, slot, buffer)
            )
            self._finished.append((ticket, error))

    def _store_one(self, key: Key, slot: int, buffer: Buffer) -> str:
        size = self.slots.slot_bytes
        self.slots.copy_from(slot, buffer.payload(size))
        outcome = self._store.store(Chunk(key=key, end_token=16), buffer, raw_bytes=size)
        return outcome.detail if not outcome.published or outcome.existed else ""

    def _load_one(self, key: Key, slot: int, buffer: Buffer) -> str:
        size = self.slots.slot_bytes
        outcome = self._store.load(key, buffer, raw_bytes=size)
        if not isinstance(outcome, Loaded):
            return str(outcome)
        self.slots.copy_to(slot, buffer.payload(size))
        return ""

    def store(self, ticket: int, chunks: Job) -> None:
        """Begin to store slots."""
        self._begin(ticket, chunks, is_store=True)

    def load(self, ticket: int, chunks: Job) -> None:
        """Begin to load into slots."""
        self._begin(ticket, chunks, is_store=False)

    def _begin(self, ticket: int, chunks: Job, *, is_store: bool) -> None:
        self._waiting[ticket] = len(chunks)
        for key, slot in chunks:
            self._queue.put((is_store, ticket, key, slot))

    def poll(self) -> list[int]:
        """Return the tickets that have ended."""
        tickets = []
        while self._finished:
            ticket, error = self._finished.popleft()
            assert not error, error
            self._waiting[ticket] -= 1
            if not self._waiting[ticket]:
                del self._waiting[ticket]
                tickets.append(ticket)
        return tickets

    def close(self) -> None:
        """End the threads and close the store."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._store.close()


class FsTier(Subject):
    """vLLM's own fs tier with its own defaults, below nothing: jobs in, results out.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, slots: Slots, directory: Path) -> None:
        super().__init__(slots)
        logging.getLogger("vllm").setLevel(logging.WARNING)
        # vLLM is optional here: the other subjects are measured without it.
        import numpy as np
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.tiering.base import TransferJob
        from vllm.v1.kv_offload.tiering.fs import io as fs_io
        from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

        self._as_ids = np.array
        self._job: Any = TransferJob
        self._context = ReqContext(req_id="benchmark")
        self._tier = FileSystemTierManager(
            SimpleNamespace(config=_offloading_config(slots.slot_bytes), blocks_per_chunk=1),
            slots.view,
            "fs",
            root_dir=str(directory),
        )
        extension = "its C extension" if fs_io._HAS_FSIO_C else "plain Python"  # noqa: SLF001
        direct = "O_DIRECT" if self._tier._use_o_direct else "the page cache"  # noqa: SLF001
        self.about = f"the fs tier moved chunks by {extension}, through {direct}"

    def store(self, ticket: int, chunks: Job) -> None:
        """Begin to store slots."""
        self._tier.submit_store(self._new_job(ticket, chunks, is_promotion=False))

    def load(self, ticket: int, chunks: Job) -> None:
        """Begin to load into slots."""
        self._tier.submit_load(self._new_job(ticket, chunks, is_promotion=True))

    def _new_job(self, ticket: int, chunks: Job, *, is_promotion: bool) -> Any:
        return self._job(
            job_id=ticket,
            keys=[key for key, _ in chunks],
            chunk_ids=self._as_ids([slot for _, slot in chunks]),
            is_promotion=is_promotion,
            req_context=self._context,
        )

    def poll(self) -> list[int]:
        """Return the tickets that have ended."""
        results = list(self._tier.get_finished_jobs())
        assert all(result.success for result in results), results
        return [result.job_id for result in results]

    def close(self) -> None:
        """End the tier's threads."""
        self._tier.shutdown()


def _offloading_config(slot_bytes: int) -> Any:
    """Describe the smallest engine: one worker, one KV group."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )

    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("0",), group_id=0),),
        worker_kv_bytes_per_block=slot_bytes,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="benchmark",
        model=OffloadingModelConfig(name="benchmark", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=True,
        ),
    )


def drive(
    subject: Subject, keys: Sequence[Key], *, depth: int, store: bool, job_chunks: int = 1
) -> float:
    """Move ``keys`` with ``depth`` of them in flight; return the seconds it took.

    What is stored is marked with its key, and what is loaded must have the mark.
    """
    begin = subject.store if store else subject.load
    slots = subject.slots
    free = list(range(depth))
    flying: dict[int, list[tuple[Key, int]]] = {}
    done = 0
    started_s = time.perf_counter()
    while flying or done < len(keys):
        while len(free) >= job_chunks and done < len(keys):
            job = [(key, free.pop()) for key in keys[done : done + job_chunks]]
            if store:
                for key, slot in job:
                    slots.stamp(slot, key)
            begin(done, job)
            flying[done] = job
            done += len(job)
        ended = subject.poll()
        if not ended:
            time.sleep(POLL_S)
        for ticket in ended:
            for key, slot in flying.pop(ticket):
                assert store or slots.is_stamped(slot, key), "another chunk's bytes"
                free.append(slot)
    return time.perf_counter() - started_s
