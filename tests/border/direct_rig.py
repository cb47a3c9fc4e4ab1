"""A worker of the direct path with a real I/O process, and plain memory for its KV cache."""

import ctypes
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from prefixstore.clock import SystemClock
from prefixstore.config import StoreConfig
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import Limits, StoreTarget
from prefixstore.keys import Key
from prefixstore.vllm.direct.device import Device, HostDevice
from prefixstore.vllm.direct.messages import (
    FindOrder,
    GroupFind,
    LoadChunk,
    LoadOrder,
    StepOrders,
    StoreOrder,
)
from prefixstore.vllm.direct.pages import Pages, Region
from prefixstore.vllm.direct.ring import StagingRing
from prefixstore.vllm.direct.worker import DirectWorker, Patience

PAGE_BYTES = 5000
BLOCKS = 12
PATIENCE_S = 20.0
STALE = b"\xee"


class Counts:
    """Counts what a worker observes."""

    def __init__(self) -> None:
        self.misses: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def missed(self, reason: str, chunks: int = 1) -> None:
        self.misses[reason] += chunks

    def skipped(self, reason: str, chunks: int = 1) -> None:
        self.skips[reason] += chunks

    def moved(self, *, loaded_bytes: int = 0, stored_bytes: int = 0) -> None:
        self.bytes.update(loaded=loaded_bytes, stored=stored_bytes)


class SlowDevice(HostDevice):
    """A device whose copies end when the test says so."""

    def __init__(self) -> None:
        self.is_slow = False
        self.held: list[Any] = []

    def store(self, copies: Any, *, after: Any) -> Any:
        super().store(copies, after=after)
        return "store"

    def is_past(self, mark: Any) -> bool:
        return not (self.is_slow and mark == "store")

    def hold_model(self, mark: Any) -> None:
        self.held.append(mark)


class FailingDevice(SlowDevice):
    """A slow device of which one call fails."""

    fails = ""

    def store(self, copies: Any, *, after: Any) -> Any:
        self._fail("store")
        return super().store(copies, after=after)

    def hold_model(self, mark: Any) -> None:
        self._fail("hold_model")
        super().hold_model(mark)

    def finish(self) -> None:
        self._fail("finish")

    def _fail(self, call: str) -> None:
        if call == self.fails:
            raise OSError(call)


class Rig:
    """A worker, its cache of two layers, and steps like a model runner's."""

    def __init__(
        self,
        root: Path,
        index: Path,
        *,
        slots: int,
        device: Device,
        is_alone: bool = True,
        **limits: Any,
    ) -> None:
        self._memory = [ctypes.create_string_buffer(PAGE_BYTES * BLOCKS) for _ in range(2)]
        pages = Pages(
            [
                Region(
                    address=ctypes.addressof(layer),
                    stride_bytes=PAGE_BYTES,
                    page_bytes=PAGE_BYTES,
                    blocks=BLOCKS,
                )
                for layer in self._memory
            ],
            blocks_per_chunk=1,
        )
        self.ring = StagingRing(
            device.allocate(slots * 3 * 4096), payload_bytes=pages.payload_bytes
        )
        assert slots == self.ring.count
        self.counts = Counts()
        self.steps = 0
        self.worker = DirectWorker(
            pages=[pages],
            device=device,
            ring=self.ring,
            observer=self.counts,
            patience=Patience(load=limits.get("load_deadline_s", 10.0)),
            clock=SystemClock(),
            element_bytes=2,
            is_alone=is_alone,
        )
        self.client = IoClient(
            StoreTarget(
                root=str(root),
                namespace=msgspec.json.encode({"model": "test"}),
                options=msgspec.json.encode(StoreConfig(index_dir=str(index), miss_ttl_s=0.0)),
            ),
            Limits(**{"buffer_count": 4, "buffer_bytes": pages.payload_bytes, **limits}),
        )
        self.settled: list[int] = []
        self.found: dict[int, int] = {}
        self.failed_requests: set[str] = set()
        self.loads: list[tuple[float, float, int]] = []
        self.steps_ended = 0
        self.ended_steps: list[int] = []
        self.is_off = False
        self.loaded: dict[
            str, set[int]
        ] = {}  # Request → blocks that failed in the step it ended in.

    def write(self, block: int, content: bytes) -> None:
        for number, layer in enumerate(self._memory):
            page = (content * PAGE_BYTES)[: PAGE_BYTES - 1] + bytes([number])
            ctypes.memmove(ctypes.addressof(layer) + block * PAGE_BYTES, page, PAGE_BYTES)

    def read(self, block: int) -> tuple[bytes, ...]:
        begin = block * PAGE_BYTES
        return tuple(layer.raw[begin : begin + PAGE_BYTES] for layer in self._memory)

    def next_orders(self, **orders: Any) -> StepOrders:
        """Number the orders of the next step."""
        self.steps += 1
        return StepOrders(number=self.steps, **orders)

    def step(self, **orders: Any) -> tuple[set[str], set[int]]:
        """Do what a model runner does in one step; return who was loaded, and what failed."""
        step = self.next_orders(**orders)
        self.worker.begin(step)
        self.worker.start(step)
        self.worker.save(step)
        loaded = self.worker.poll()
        failed = self.worker.take_failed_blocks()
        self.failed_requests |= self.worker.take_failed_requests()
        self.loaded.update(dict.fromkeys(loaded, failed))
        if (report := self.worker.take_report()) is not None:
            self.settled += report.settled
            self.loads += report.loads
            self.steps_ended += report.ends_step
            self.ended_steps.append(report.ended)
            self.is_off |= report.is_off
            self.found.update({t: sum(sum(part) for part in f) for t, f in report.found.items()})
        return loaded, failed

    def step_until(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"waited {PATIENCE_S} s for {what}"
            self.step()
            time.sleep(0.002)

    def await_load(self, name: str) -> set[int]:
        """Step until a request's load has ended; return the blocks that were not brought."""
        end_s = time.monotonic() + PATIENCE_S
        while name not in self.loaded:
            assert time.monotonic() < end_s, f"waited {PATIENCE_S} s for the load of {name}"
            self.step()
            time.sleep(0.002)
        return self.loaded.pop(name)


def stop(rig: Rig) -> int:
    """Stop a worker's I/O process, wait until all its threads stand still, and return its id."""
    process = rig.client._pump._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)

    def stands() -> bool:
        states = (path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/stat"))
        return all(state.rpartition(")")[2].split()[0] == "T" for state in states)

    rig.step_until(stands, "the process to stand still")
    return process.pid


def key(number: int) -> Key:
    return Key(bytes([number]) * 32 + bytes(4))


def store(number: int, *, block: int, name: str = "r") -> StoreOrder:
    return StoreOrder(
        number=number,
        request_id=name,
        key=key(number),
        parent=key(number - 1) if number > 1 else None,
        end_token=16 * number,
        blocks=(block,),
    )


def find(ticket: int, *numbers: int) -> FindOrder:
    group = GroupFind(keys=tuple(map(key, numbers)), chunk_tokens=16, is_chained=True)
    return FindOrder(ticket=ticket, groups=(group,))


def load(name: str, places: dict[int, int], *, is_whole: bool = False) -> LoadOrder:
    chunks = [LoadChunk(key=key(n), blocks=(block,), first=0) for n, block in places.items()]
    return LoadOrder(request_id=name, chunks=tuple(chunks), is_whole=is_whole)


def fill(rig: Rig, count: int) -> None:
    """Publish chunks 1 to ``count``; chunk ``n`` holds the byte ``n``."""
    for number in range(1, count + 1):
        rig.write(number, bytes([number]))
    rig.step(stores=[store(n, block=n) for n in range(1, count + 1)])
    whole = rig.read(1)
    rig.step_until(
        lambda: count * sum(map(len, whole)) == rig.counts.bytes["stored"], "all to be stored"
    )
