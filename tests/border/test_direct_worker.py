"""What a worker of the direct path finds, loads, stores and tells."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixstore.vllm.direct.device import HostDevice
from prefixstore.vllm.direct.messages import FindOrder, GroupFind, StepOrders
from tests.border.direct_rig import (
    PATIENCE_S,
    STALE,
    FailingDevice,
    Rig,
    SlowDevice,
    fill,
    find,
    key,
    load,
    stop,
    store,
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
    rig.worker.close(10.0, last=[])
    reader.step(finds=[find(1, *range(1, 11))])
    reader.step_until(lambda: 1 in reader.found, "an answer")

    assert {1: 10} == reader.found


def test_a_store_that_comes_after_the_end_is_closed(tmp_path: Path) -> None:
    """Identifying weights may take longer than the engine lives."""
    rig = Rig(tmp_path / "root", tmp_path / "index", slots=4, device=HostDevice())
    rig.worker.close(0.1, last=[])
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
    first.worker.close(5.0, last=[])
    rig = Rig(tmp_path / "root", tmp_path / "index", slots=4, device=HostDevice())
    rig.step(finds=[find(1, 1, 2)])
    assert {} == rig.found
    rig.worker.bind(rig.client)
    rig.step_until(lambda: 1 in rig.found, "an answer")
    rig.worker.close(2.0, last=[])

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
        rig.worker.begin(rig.next_orders(overwritten=[1, 3]))
    device.fails, device.is_slow = "", False
    rig.step_until(lambda: not rig.client.busy, "what was left")
    rig.step(finds=[find(7, 1, 2, 3)])
    rig.step_until(lambda: 7 in rig.found, "an answer")

    assert {"overwritten": 1, "error": 2} == rig.counts.skips
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
