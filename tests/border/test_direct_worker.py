"""A worker of the direct path with a real I/O process, and plain memory for its KV cache."""

import ctypes
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

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


class Rig:
    """A worker, its cache of two layers, and steps like a model runner's."""

    def __init__(
        self, root: Path, index: Path, *, slots: int, device: Device, **limits: Any
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
        ring = StagingRing(device.allocate(slots * 3 * 4096), payload_bytes=pages.payload_bytes)
        assert slots == ring.count
        self.counts = Counts()
        self.worker = DirectWorker(
            pages=[pages],
            device=device,
            ring=ring,
            observer=self.counts,
            patience=Patience(load=limits.get("load_deadline_s", 10.0)),
            clock=SystemClock(),
            element_bytes=2,
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

    def step(self, **orders: Any) -> tuple[set[str], set[int]]:
        """Do what a model runner does in one step; return who was loaded, and what failed."""
        step = StepOrders(**orders)
        self.worker.lose_blocks(step)
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


@pytest.fixture
def new_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Give a function that makes workers on one root, bound to an open store; all are closed."""
    rigs: list[Rig] = []

    def make(*, slots: int = 4, device: Device | None = None, **limits: Any) -> Rig:
        index = tmp_path / f"index-{len(rigs)}"
        rig = Rig(tmp_path / "root", index, slots=slots, device=device or HostDevice(), **limits)
        rigs.append(rig)
        rig.worker.bind(rig.client)
        rig.step_until(lambda: rig.worker.state == "on", "the store to open")
        return rig

    yield make
    for rig in rigs:
        rig.worker.close(2.0)


def fill(rig: Rig, count: int) -> None:
    """Publish chunks 1 to ``count``; chunk ``n`` holds the byte ``n``."""
    for number in range(1, count + 1):
        rig.write(number, bytes([number]))
    rig.step(stores=[store(n, block=n) for n in range(1, count + 1)])
    whole = rig.read(1)
    rig.step_until(
        lambda: count * sum(map(len, whole)) == rig.counts.bytes["stored"], "all to be stored"
    )


def test_more_chunks_than_buffers_are_stored_and_loaded(new_rig: Callable[..., Rig]) -> None:
    """Ten chunks pass through a ring of three, out and back into other blocks of another worker."""
    writer, reader = new_rig(slots=3), new_rig(slots=3)
    fill(writer, 10)
    reader.step(finds=[find(5, *range(1, 13))])
    reader.step_until(lambda: 5 in reader.found, "an answer")
    reader.step(loads=[load("r", {n: 11 - n for n in range(1, 11)})])

    assert sorted(writer.settled) == list(range(1, 11))
    assert {5: 10} == reader.found
    assert set() == reader.await_load("r")
    assert [writer.read(n) for n in range(1, 11)] == [reader.read(11 - n) for n in range(1, 11)]
    assert ({}, {}) == (writer.counts.skips, reader.counts.misses)


def test_damage_fails_its_own_block_and_those_behind(
    new_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    """The blocks from a damaged chunk on are reported, those before it are right."""
    rig = new_rig(slots=1, buffer_count=1)
    fill(rig, 4)
    (blob,) = (tmp_path / "root").glob(f"ns/*/*/*/{key(2).hex()}.kv")
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    blob.write_bytes(data)
    for block in (5, 6, 7, 8):
        rig.write(block, STALE)
    stale = rig.read(6)
    rig.step(loads=[load("r", {1: 5, 2: 6, 3: 7, 4: 8})])

    assert {6, 7, 8} == rig.await_load("r")
    assert rig.read(1) == rig.read(5)
    assert stale == rig.read(6), "nothing that failed its check reaches the device"
    assert {"digest": 1} == rig.counts.misses


def test_a_load_that_comes_late_reaches_nothing(new_rig: Callable[..., Rig]) -> None:
    """After its deadline a load is reported, its block is another's, and the late bytes end nowhere."""
    rig = new_rig(load_deadline_s=0.3)
    fill(rig, 2)
    process = stop(rig)
    rig.step(loads=[load("r", {1: 5, 2: 6})])
    try:
        failed = rig.await_load("r")
        rig.write(5, STALE)
        reused = rig.read(5)
    finally:
        os.kill(process, signal.SIGCONT)
    time.sleep(0.3)
    rig.step()

    assert {5, 6} == failed
    assert reused == rig.read(5)
    assert {"timeout": 2} == rig.counts.misses


def test_blocks_that_a_step_gives_away_are_read_no_more(new_rig: Callable[..., Rig]) -> None:
    """What is being copied is waited for by the device; what waits for a buffer is dropped."""
    device = SlowDevice()
    rig = new_rig(slots=3, device=device)
    for block in (1, 2, 3):
        rig.write(block, bytes([block]))
    kept = rig.read(3)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2, 3)])
    rig.step(overwritten=[1, 2])
    assert (["store"], {"overwritten": 1}) == (device.held, rig.counts.skips)
    for block in (1, 2):
        rig.write(block, STALE)
    device.is_slow = False
    rig.step_until(lambda: rig.counts.bytes["stored"] == 2 * sum(map(len, kept)), "two stores")
    rig.step(loads=[load("r", {1: 5, 3: 7})])

    assert set() == rig.await_load("r")
    assert (bytes([1]), kept) == (rig.read(5)[0][:1], rig.read(7))
    assert [1, 2, 3] == sorted(rig.settled)


def test_where_nobody_can_tell_all_are_taken_for_overwritten(new_rig: Callable[..., Rig]) -> None:
    """A step whose blocks are not known drops all that waits."""
    device = SlowDevice()
    rig = new_rig(slots=3, device=device)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2, 3)])
    rig.step(are_all_overwritten=True)

    assert (["store"], {"overwritten": 2}) == (device.held, rig.counts.skips)


def test_an_engine_that_ends_publishes_what_waits(new_rig: Callable[..., Rig]) -> None:
    """Ten chunks through a ring of three, with no step after the one that offered them."""
    rig, reader = new_rig(slots=3), new_rig()
    for number in range(1, 11):
        rig.write(number, bytes([number]))
    rig.step(stores=[store(n, block=n) for n in range(1, 11)])
    rig.worker.close(10.0)
    reader.step(finds=[find(1, *range(1, 11))])
    reader.step_until(lambda: 1 in reader.found, "an answer")

    assert {1: 10} == reader.found


def test_a_store_that_comes_after_the_end_is_closed(tmp_path: Path) -> None:
    """Identifying weights may take longer than the engine lives."""
    rig = Rig(tmp_path / "root", tmp_path / "index", slots=4, device=HostDevice())
    rig.worker.close(0.1)
    rig.worker.bind(rig.client)

    assert "off" == rig.worker.state or rig.client._pump._process is None


def test_without_a_store_everything_is_answered(new_rig: Callable[..., Rig]) -> None:
    """Turned off, finds find nothing, loads fail and stores are dropped, all at once."""
    rig = new_rig()
    rig.worker.turn_off("the test says so")
    loaded, failed = rig.step(
        finds=[find(1, 1)],
        loads=[load("r", {1: 5})],
        stores=[store(2, block=2)],
    )

    assert ({1: 0}, {"r"}, {5}, [2]) == (rig.found, loaded, failed, rig.settled)


def test_the_first_lookup_waits_for_the_store_to_open(tmp_path: Path) -> None:
    """An engine that just came back is not told that its warm prefix is unknown."""
    first = Rig(tmp_path / "root", tmp_path / "index", slots=4, device=HostDevice())
    first.worker.bind(first.client)
    fill(first, 2)
    first.worker.close(5.0)
    rig = Rig(tmp_path / "root", tmp_path / "index", slots=4, device=HostDevice())
    rig.step(finds=[find(1, 1, 2)])
    assert {} == rig.found
    rig.worker.bind(rig.client)
    rig.step_until(lambda: 1 in rig.found, "an answer")
    rig.worker.close(2.0)

    assert {1: 2} == rig.found


def test_after_a_bug_nothing_lands_and_every_request_is_reported(
    new_rig: Callable[..., Rig],
) -> None:
    """Giving everything up reports all blocks as failed, and lends every buffer anew."""
    rig = new_rig(slots=2)
    fill(rig, 2)
    rig.write(5, STALE)
    stale = rig.read(5)
    process = stop(rig)
    rig.step(loads=[load("r", {1: 5, 2: 6})])
    abandoned = rig.worker.abandon()
    os.kill(process, signal.SIGCONT)
    failed = rig.worker.take_failed_blocks()
    rig.step_until(lambda: not rig.client.busy, "the late loads")

    assert ({"r"}, {5, 6}) == (abandoned, failed)
    assert stale == rig.read(5)
    rig.step(loads=[load("again", {1: 5, 2: 6})])
    assert set() == rig.await_load("again")


def test_a_load_that_a_reset_overtakes_is_not_used(new_rig: Callable[..., Rig]) -> None:
    """What was computed by the weights of before is reported as missing, even if it arrives whole."""
    rig = new_rig()
    fill(rig, 2)
    rig.worker.start(StepOrders(loads=[load("r", {1: 5, 2: 6})]))
    rig.worker.poll()
    failed = rig.step(is_off=True)[1] or rig.await_load("r")

    assert {5, 6} == failed
    assert "off" == rig.worker.state


def test_after_a_bug_the_ring_is_whole_again(new_rig: Callable[..., Rig]) -> None:
    """Giving everything up gives back the buffers of copies under way and of stores that wait."""
    device = SlowDevice()
    rig = new_rig(slots=3, device=device)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2)])

    assert set() == rig.worker.abandon()
    device.is_slow = False
    fill(rig, 3)


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


@pytest.mark.parametrize("broken", ["device", "client"])
def test_a_copy_that_fails_costs_its_stores_only(
    new_rig: Callable[..., Rig], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores that cannot begin are skipped, and later ones of the same chunks are stored."""
    device = FailingDevice()
    rig = new_rig(slots=4, device=device)

    def fail(*_: Any) -> bool:
        raise OSError(broken)

    if broken == "device":
        device.fails = "store"
        with pytest.raises(OSError, match="store"):
            rig.step(stores=[store(n, block=n) for n in (1, 2)])
    else:
        monkeypatch.setattr(rig.client, "store", fail)
        rig.step(stores=[store(n, block=n) for n in (1, 2)])
    monkeypatch.undo()
    device.fails = ""
    rig.step()

    assert ([1, 2], {"error": 2}) == (rig.settled, rig.counts.skips)
    fill(rig, 3)


def test_a_device_that_cannot_be_held_publishes_nothing_of_what_is_overwritten(
    new_rig: Callable[..., Rig],
) -> None:
    """Neither what waits nor what is being copied while another request writes its blocks."""
    device = FailingDevice()
    rig = new_rig(slots=3, device=device)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2, 3)])
    device.fails = "hold_model"
    with pytest.raises(OSError, match="hold_model"):
        rig.worker.lose_blocks(StepOrders(overwritten=[1, 3]))
    device.fails, device.is_slow = "", False
    rig.step_until(lambda: not rig.client.busy, "what was left")
    rig.step(finds=[find(7, 1, 2, 3)])
    rig.step_until(lambda: 7 in rig.found, "an answer")

    assert {"overwritten": 1, "error": 1} == rig.counts.skips
    assert {7: 0} == rig.found, "chained from the first"


def test_a_device_that_cannot_finish_keeps_no_request_waiting(
    new_rig: Callable[..., Rig],
) -> None:
    """Giving everything up reports loads, even if the device is gone."""
    device = FailingDevice()
    rig = new_rig(slots=3, device=device)
    device.is_slow, device.fails = True, "finish"
    rig.step(stores=[store(1, block=1)])
    rig.step(loads=[load("s", {2: 5})])

    assert {"s"} == rig.worker.abandon()


def test_a_worker_that_is_off_for_good_says_so_once(new_rig: Callable[..., Rig]) -> None:
    """The scheduler's side then asks and offers no more."""
    rig = new_rig()
    assert rig.worker.take_report() is None
    rig.worker.turn_off("the test says so")
    report = rig.worker.take_report()

    assert report is not None
    assert report.is_off
    assert rig.worker.take_report() is None


def test_of_a_whole_load_that_fails_the_request_is_reported(new_rig: Callable[..., Rig]) -> None:
    """Where blocks before a missing one are not all kept, no block is named: nothing of it is used."""
    rig = new_rig()
    fill(rig, 1)
    rig.step(loads=[load("r", {1: 5, 9: 6}, is_whole=True), load("s", {1: 7}, is_whole=True)])
    failed = rig.await_load("r") | rig.await_load("s")

    assert (set(), {"r"}) == (failed, rig.failed_requests)
    rig.step(loads=[load("t", {1: 8, 2: 9}, is_whole=True)])
    assert {"t"} == rig.worker.abandon()
    assert ({"t"}, set()) == (rig.worker.take_failed_requests(), rig.worker.take_failed_blocks())


def test_windows_are_looked_for_up_to_where_full_attention_ends(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked second, back to front, and not at all behind the first chunk that is missing."""
    rig = new_rig()
    fill(rig, 4)
    asked: list[tuple[list[int], bool]] = []
    find_chunks = rig.client.find

    def note(ticket: int, keys: Any, *, chained: bool) -> None:
        asked.append(([one[0] for one in keys], chained))
        find_chunks(ticket, keys, chained=chained)

    monkeypatch.setattr(rig.client, "find", note)
    flags: dict[int, tuple[bytes, ...]] = {}
    full = GroupFind(keys=tuple(map(key, (1, 2, 3, 9, 8))), chunk_tokens=16, is_chained=True)
    window = GroupFind(keys=tuple(map(key, (8, 2, 4, 1, 3))), chunk_tokens=16, is_chained=False)
    nothing = GroupFind(keys=(key(7),), chunk_tokens=16, is_chained=True)
    rig.worker.start(
        StepOrders(
            finds=[
                FindOrder(ticket=1, groups=(full, window)),
                FindOrder(ticket=2, groups=(window, nothing)),
                FindOrder(ticket=3, groups=(window,)),
            ]
        )
    )
    end_s = time.monotonic() + PATIENCE_S
    while len(flags) < 3 and time.monotonic() < end_s:
        rig.worker.poll()
        flags.update(getattr(rig.worker.take_report(), "found", {}))

    assert {1: (b"\1\1\1\0\0", b"\0\1\1"), 2: (b"", b"\0"), 3: (b"\0\1\1\1\1",)} == flags
    assert ([4, 2, 8], False) in asked
    assert ([3, 1, 4, 2, 8], False) in asked


def test_what_loads_took_and_steps_that_computed_are_told(new_rig: Callable[..., Rig]) -> None:
    """Each load counts once, with its bytes; a step without a forward pass is none."""
    rig = new_rig()
    fill(rig, 3)
    payload_bytes = sum(map(len, rig.read(1)))
    ended = rig.steps_ended
    rig.step(loads=[load("r", {1: 5, 2: 6, 3: 7})], is_idle=True)
    while "r" not in rig.loaded:
        rig.step(is_idle=True)
    rig.step()

    assert ended + 1 == rig.steps_ended
    assert 3 == sum(count for _, _, count in rig.loads)
    assert 3 * payload_bytes == sum(amount for amount, _, _ in rig.loads)
    assert all(seconds > 0 for _, seconds, _ in rig.loads)
