"""What our tier does later, and says: skipped chunks are stored from the CPU tier, changes are announced."""

import os
import signal

import pytest
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
)

from prefixstore.keys import Key
from prefixstore.vllm.reoffers import REFUSED_MAX, Reoffers
from tests.vllm.managers import CHUNK_BYTES, prompt, stored_in


def test_chunks_refused_while_the_root_was_away_are_stored_when_it_is_back(drive, tmp_path):
    """What vLLM offered in vain is taken from its CPU tier later: those that it still holds."""
    root = tmp_path / "root"
    root.write_text("in the way")
    driver = drive(slots=16)
    driver.await_state("off")
    driver.serve("r1", prompt("a", 10))
    driver.serve("r2", prompt("b", 10))
    driver.settle()
    held = {
        key
        for key in (*prompt("a", 10), *prompt("b", 10))
        if driver.manager.primary_tier.lookup(key, ReqContext(req_id="look")) is LookupResult.HIT
    }
    assert 16 == len(held)

    root.unlink()
    driver.await_state("on")
    driver.await_stored(held, root)

    other = drive()
    other.await_state("on")
    assert 10 == other.serve("r3", prompt("b", 10))
    # Nothing stays pinned: a prompt as long as the CPU tier still finds room in it.
    driver.serve("r4", prompt("c", 16))
    driver.settle()
    driver.reset()
    assert 16 == driver.serve("r5", prompt("c", 16))


def test_chunks_that_a_hung_process_did_not_store_are_offered_again(drive, tmp_path):
    """A deadline that passed costs the chunks a delay, not their place on the root."""
    driver = drive(store_deadline_s=0.3, drain_s=1.0)
    driver.await_state("on")
    keys = prompt("a", 6)
    child = driver.tier._binding.client._pump._process.pid
    os.kill(child, signal.SIGSTOP)
    driver.serve("r1", keys)
    driver.settle()
    skipped = driver.tier.get_stats().data["data"]["vllm:prefixstore_stores_skipped"]
    os.kill(child, signal.SIGKILL)

    driver.await_state("on")
    driver.await_stored(keys, tmp_path / "root")

    assert {("timeout",): 6} == skipped
    data = driver.tier.get_stats().data["data"]
    assert data["vllm:prefixstore_stores_reoffered"] == {(): 6}


def test_what_was_refused_is_never_offered_to_a_store_that_was_turned_off(drive, tmp_path):
    """After a reset of weights the CPU tier may hold other bytes under these keys."""
    root = tmp_path / "root"
    root.write_text("in the way")
    driver = drive()
    driver.await_state("off")
    driver.serve("r1", prompt("a", 4))
    root.unlink()
    driver.tier.turn_off("for a test")
    driver._until(lambda: driver.tier._binding.client.state == "on", "the root")
    driver.settle()
    driver.serve("r2", prompt("b", 4))
    driver.settle()

    assert set() == stored_in(root)


def test_stored_and_evicted_chunks_are_announced(drive, tmp_path):
    """What was announced as stored and not as removed since is what the root holds."""
    root = tmp_path / "root"
    driver = drive(events=True, locality="REMOTE", max_bytes=20 * (CHUNK_BYTES + 4096))
    driver.await_state("on")
    believed: set[OffloadKey] = set()
    announced = {False: 0, True: 0}

    def believe() -> None:
        for event in driver.manager.take_events():
            if event.medium is Medium.STORAGE:
                assert event.locality is Locality.REMOTE
                (believed.difference_update if event.removed else believed.update)(event.keys)
                announced[event.removed] += len(event.keys)

    first = prompt("a", 8)
    driver.serve("first", first)
    driver.settle()
    believe()
    assert set(first) == believed == stored_in(root)
    assert {False: 8, True: 0} == announced

    for i in range(8):
        driver.serve(f"r{i}", prompt(f"p{i}", 8))
        driver.settle()

    def agrees() -> bool:
        driver.settle()
        believe()
        return announced[True] > 0 and believed == stored_in(root)

    driver._until(agrees, "the announcements to agree with the root")


def test_a_chunk_found_gone_is_announced_as_removed(drive, tmp_path):
    """What another host evicted is announced when this one misses it."""
    driver = drive(events=True)
    driver.await_state("on")
    keys = prompt("a", 4)
    driver.serve("r1", keys)
    driver.settle()
    driver.reset()
    list(driver.manager.take_events())
    (gone,) = (tmp_path / "root").glob(f"ns/*/*/*/{bytes(keys[-1]).hex()}.kv")
    gone.unlink()

    hits = driver.serve("r2", keys)
    driver.settle()

    events = [e for e in driver.manager.take_events() if e.medium is Medium.STORAGE]
    assert hits == 3
    assert [(True, [keys[-1]]), (False, [keys[-1]])] == [(e.removed, e.keys) for e in events]


@pytest.mark.parametrize(
    "settings", [{"events": False}, {"events": True, "enable_kv_events": False}]
)
def test_without_a_listener_no_events_are_kept(drive, settings):
    """Where vLLM does not take events, or the user wants none, none are collected."""
    driver = drive(**settings)
    driver.await_state("on")
    driver.serve("r1", prompt("a", 4))
    driver.settle()

    assert [] == [e for e in driver.manager.take_events() if e.medium is Medium.STORAGE]
    assert 0 == len(driver.tier._binding.client._pump.changes)


def test_a_root_that_refuses_again_is_asked_ever_more_rarely():
    """The pause doubles up to half a minute, is short again once something was stored, then none."""
    keys = [Key(bytes(key)) for key in prompt("a", 10)]
    reoffers = Reoffers()
    now_s, pauses = 0.0, []
    for job, (stored, skipped) in enumerate([(0, 4)] * 7 + [(1, 3), (4, 0)]):
        reoffers.refused(dict.fromkeys(keys, (16, None)), "full")
        assert 4 == len(reoffers.due(now_s, slots=16)), "a quarter of the slots"
        reoffers.started(job)
        assert {} == reoffers.due(now_s + 1e6, slots=16), "one job at a time"
        reoffers.ended(job, now_s, stored=stored, skipped=skipped)
        pause_s = 0.0
        while not (taken := reoffers.due(now_s + pause_s, slots=16)):
            pause_s += 0.5
        reoffers.refused(taken, "full")
        pauses.append(pause_s)
        now_s += pause_s

    assert [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 1.0, 0.0] == pauses


def test_of_too_many_refused_chunks_the_latest_are_kept():
    """Memory is bounded, and what was refused for good is not kept at all."""
    reoffers = Reoffers()
    keys = [Key(i.to_bytes(32, "big") + bytes(4)) for i in range(REFUSED_MAX + 2)]
    for key in keys:
        reoffers.refused({key: (16, None)}, "off")
    reoffers.refused({Key(b"\xff" * 36): (16, None)}, "read_only")

    assert REFUSED_MAX == len(reoffers)
    assert keys[2:6] == list(reoffers.due(0.0, slots=16))
