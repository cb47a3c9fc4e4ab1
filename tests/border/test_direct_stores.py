"""What a worker of the direct path publishes: after a step that failed, of chunks ordered twice, and at its end."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixstore.vllm.direct import stores
from prefixstore.vllm.direct.device import HostDevice
from prefixstore.vllm.direct.pages import Copies, join_copies
from tests.border.direct_rig import (
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

NewRig = Callable[..., Rig]


class LateDevice(HostDevice):
    """A device whose copies are past some milliseconds after they were submitted."""

    def store(self, copies: Any, *, after: Any) -> Any:
        super().store(copies, after=after)
        return time.monotonic() + 0.003

    def is_past(self, mark: Any) -> bool:
        return mark is None or time.monotonic() >= mark


def stored(root: Path) -> list[int]:
    """Name the chunks of a root."""
    return sorted(int(blob.stem[:2], 16) for blob in root.glob("root/ns/*/*/*/*.kv"))


def ended(rig: Rig) -> bool:
    """Whether no store is under way."""
    return not rig.worker.is_storing and not rig.client.busy


def write(rig: Rig, count: int) -> None:
    """Let blocks 1 to ``count`` hold their numbers."""
    for number in range(1, count + 1):
        rig.write(number, bytes([number]))


@pytest.mark.parametrize("failure", ["it raises", "it does not end", "it does not begin"])
def test_after_a_step_that_failed_nothing_is_stored(
    new_rig: NewRig, tmp_path: Path, failure: str
) -> None:
    """Neither its own chunks, nor those that waited, nor what the steps after it make of its KV."""
    device = SlowDevice()
    rig = new_rig(slots=3, device=device)
    write(rig, 6)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2)])
    orders = rig.next_orders(stores=[store(3, block=3)])
    if failure != "it does not begin":
        rig.worker.begin(orders)
    if failure == "it raises":
        rig.worker.fail()
        rig.worker.save(orders)
        rig.worker.take_report()  # With the step's output it goes nowhere.
    device.is_slow = False
    for number in (4, 5):
        rig.step(stores=[store(number, block=number)])
    rig.step_until(lambda: ended(rig), "stores")

    assert [] == stored(tmp_path)
    assert rig.is_off
    assert {1, 4, 5} <= set(rig.settled), "nobody waits for them"
    assert len(rig.ring.free) == rig.ring.count


def test_the_step_after_one_without_orders_that_failed_stores_nothing(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """A failed step counts whether it had orders or not."""
    rig = new_rig()
    write(rig, 2)
    rig.next_orders()
    rig.step(stores=[store(1, block=1)])
    rig.step_until(lambda: ended(rig), "stores")

    assert [] == stored(tmp_path)


def test_of_ranks_that_compute_together_none_publishes_before_all_have_ended(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """What a rank copied is held until its step came through everywhere; then others may have its blocks."""
    rig = new_rig(is_alone=False, slots=4)
    write(rig, 2)
    rig.step(stores=[store(n, block=n) for n in (1, 2)])
    number = rig.steps
    for _ in range(20):
        rig.step(proven=number - 1)
        time.sleep(0.002)
    assert ([], []) == (stored(tmp_path), rig.settled)
    assert number + 20 == rig.ended_steps[-1]
    rig.step(proven=number)
    rig.step_until(lambda: ended(rig), "stores")

    assert [1, 2] == stored(tmp_path)
    assert [1, 2] == rig.settled


def test_what_another_rank_spoiled_is_never_published(new_rig: NewRig, tmp_path: Path) -> None:
    """Once the engine says that the store is off, what was held is dropped, and the ring is whole."""
    rig = new_rig(is_alone=False)
    write(rig, 2)
    rig.step(stores=[store(n, block=n) for n in (1, 2)])
    rig.step(is_off=True)
    rig.step(proven=rig.steps)
    rig.worker.close(1.0, last=[])

    assert [] == stored(tmp_path)
    assert {"off": 2} == rig.counts.skips
    assert len(rig.ring.free) == rig.ring.count


def test_late_stores_that_their_step_overwrites_are_dropped(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """Blocks of a request that has ended may be given away with the very step that orders their stores."""
    rig = new_rig()
    write(rig, 2)
    orders = rig.next_orders(late_stores=[store(n, block=n) for n in (1, 2)], overwritten=[1])
    rig.worker.begin(orders)
    rig.write(1, STALE)
    rig.worker.start(orders)
    rig.worker.save(orders)
    rig.step_until(lambda: ended(rig), "stores")

    assert [2] == stored(tmp_path)
    assert {"overwritten": 1} == rig.counts.skips


def test_of_copies_that_are_not_held_back_none_is_published(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """Where the device cannot hold the model back for one copy, others that it overwrites are not trusted either."""
    device = FailingDevice()
    rig = new_rig(slots=4, device=device)
    write(rig, 2)
    device.is_slow = True
    for number in (1, 2):
        rig.step(stores=[store(number, block=number)])
    device.fails = "hold_model"
    with pytest.raises(OSError, match="hold_model"):
        rig.worker.begin(rig.next_orders(overwritten=[1, 2]))
    write_stale(rig, 2)
    device.fails, device.is_slow = "", False
    rig.steps -= 1  # The step goes on: its end is what counts.
    rig.worker.save(rig.next_orders())
    rig.step_until(lambda: ended(rig), "stores")

    assert [] == stored(tmp_path)
    fill(rig, 3)


def write_stale(rig: Rig, count: int) -> None:
    """Let blocks 1 to ``count`` be another's."""
    for number in range(1, count + 1):
        rig.write(number, STALE)


def test_a_chunk_that_is_ordered_twice_outlives_the_loss_of_one_of_its_blocks(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """The first order's block is handed on while it waits; the second's still holds the chunk."""
    rig = new_rig(slots=4)
    write(rig, 6)
    rig.write(7, bytes([6]))
    process = stop(rig)
    rig.step(stores=[store(n, block=n) for n in range(1, 7)])
    again = replace(store(16, block=7, name="b"), key=key(6), parent=key(5))
    rig.step(stores=[again])
    rig.step(overwritten=[6])
    rig.write(6, STALE)
    os.kill(process, signal.SIGCONT)
    rig.step_until(lambda: ended(rig), "stores")
    rig.step(loads=[load("r", {6: 8})])

    assert set() == rig.await_load("r")
    assert (list(range(1, 7)), rig.read(7)) == (stored(tmp_path), rig.read(8))


def test_a_chunk_that_is_ordered_twice_is_copied_once(
    new_rig: NewRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second order ends while the first is on its way."""
    rig = new_rig(slots=8)
    write(rig, 2)
    copied: list[int] = []

    def join(parts: list[Copies]) -> Copies:
        copied.append(len(parts))
        return join_copies(parts)

    monkeypatch.setattr(stores, "join_copies", join)
    rig.step(stores=[store(1, block=1), replace(store(2, block=2), key=key(1), parent=None)])
    rig.step_until(lambda: ended(rig), "stores")

    assert [1] == copied
    assert ([1, 2], {}) == (sorted(rig.settled), rig.counts.skips)


def test_an_engine_that_ends_waits_for_copies_under_way(new_rig: NewRig, tmp_path: Path) -> None:
    """Eight chunks through a ring of four, on a device that copies while the host goes on."""
    rig = new_rig(slots=4, device=LateDevice())
    write(rig, 8)
    rig.step(stores=[store(n, block=n) for n in range(1, 9)])
    rig.worker.close(10.0, last=[])

    assert list(range(1, 9)) == stored(tmp_path)


def test_an_engine_that_ends_hears_what_became_of_its_stores(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """Forty chunks pass where eight may wait for the I/O process at a time."""
    rig = new_rig(slots=4, stores_waiting_max=8)
    rig.write(1, b"x")
    rig.step(stores=[store(n, block=1) for n in range(1, 41)])
    rig.worker.close(10.0, last=[])

    assert (list(range(1, 41)), {}) == (stored(tmp_path), rig.counts.skips)


def test_an_engine_that_ends_on_a_broken_device_ends_its_io_process(new_rig: NewRig) -> None:
    """Whatever fails on the way out, nothing of ours is left running."""
    device = FailingDevice()
    rig = new_rig(slots=3, device=device)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2, 3)])
    device.is_slow, device.fails = False, "store"
    process = rig.client._pump._process
    assert process is not None
    with pytest.raises(OSError, match="store"):
        rig.worker.close(5.0, last=[])
    device.fails = ""

    assert not Path(f"/proc/{process.pid}").exists()


def test_a_worker_that_nobody_vouches_for_copies_nothing_at_its_end(
    new_rig: NewRig, tmp_path: Path
) -> None:
    """What was copied before is published; what waits may hold anything by now."""
    device = SlowDevice()
    rig = new_rig(slots=3, device=device)
    write(rig, 3)
    device.is_slow = True
    rig.step(stores=[store(n, block=n) for n in (1, 2, 3)])
    write_stale(rig, 3)
    device.is_slow = False
    rig.worker.close(10.0, last=None)

    assert [1] == stored(tmp_path)
    assert {"off": 2} == rig.counts.skips


def test_the_last_stores_of_an_engine_need_no_step(new_rig: NewRig, tmp_path: Path) -> None:
    """What ended requests left to store goes out with the engine's end."""
    rig = new_rig()
    write(rig, 2)
    rig.worker.close(10.0, last=[store(n, block=n) for n in (1, 2)])

    assert [1, 2] == stored(tmp_path)


def test_finds_go_on_while_stores_are_held(new_rig: NewRig) -> None:
    """Ranks that compute together answer whatever waits to be proven."""
    rig = new_rig(is_alone=False)
    write(rig, 1)
    rig.step(stores=[store(1, block=1)], finds=[find(5, 1)])
    rig.step_until(lambda: 5 in rig.found, "an answer")

    assert {5: 0} == rig.found
