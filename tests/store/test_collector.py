"""The background eviction of several hosts: one at a time, and none less for want of a lease."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.store import PrefixStore, SkipReason
from prefixstore.store.collector import LOOK_S, PASS_S
from prefixstore.store.evictor import BATCH_VICTIMS
from prefixstore.testing.chains import FILE_BYTES, chain, chunk_at, payload_of, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Cut, Fail, FaultyOs, When
from prefixstore.tree.lease import BEAT_S, PATIENCE_S, Lease
from prefixstore.tree.limits import LimitsDocument, write_limits
from prefixstore.tree.osfs import RealOs
from prefixstore.tree.root import Root

OpenStore = Callable[..., PrefixStore]

QUOTA = {"max_bytes": 20 * FILE_BYTES}


def blobs(root: str) -> int:
    """Count the blobs in the tree, past every index."""
    return sum(1 for _ in Path(root).glob("ns/*/*/*/*.kv"))


def test_a_host_leaves_eviction_to_the_one_that_is_at_it(open_store: OpenStore, root: str) -> None:
    """And does it itself once the lease is free, with the next chunk that does not fit."""
    clock = ManualClock()
    store = open_store(config=QUOTA, clock=clock, index=None)
    other = Lease(store.root, holder="b" * 32, clock=clock)
    assert other.acquire()
    store_chain(store, chain("a", 25))
    store.work()
    assert (blobs(root), store.counters().get("evictions", 0)) == (20, 0)
    assert store.counters()["evictions_left"] == 1

    other.release()
    clock.advance(BEAT_S)
    new = chain("b", 1)
    assert store.store(chunk_at(new, 0), payload_of(new[0])).reason is SkipReason.QUOTA
    store.work()
    assert (blobs(root), store.counters()["evictions"]) == (17, 1)
    assert other.acquire(), "an eviction that has ended leaves the lease free"


def test_a_host_takes_over_from_one_that_died(open_store: OpenStore, root: str) -> None:
    """Stores that do not fit ask again and again; none waits longer than the patience."""
    clock = ManualClock()
    store = open_store(config=QUOTA, clock=clock, index=None)
    assert Lease(store.root, holder="d" * 32, clock=clock).acquire()
    store_chain(store, chain("a", 25))
    new, waited_s = chain("b", 1), 0.0
    store.work()
    while not store.store(chunk_at(new, 0), payload_of(new[0])).published:
        assert waited_s <= PATIENCE_S + BEAT_S
        clock.advance(BEAT_S)
        waited_s += BEAT_S
        store.store(chunk_at(new, 0), payload_of(new[0]))
        store.work()
    assert blobs(root) == 18


def test_an_eviction_that_was_followed_ends(open_store: OpenStore, root: str) -> None:
    """A host that wakes from a pause, and sees another at it, removes no further batch."""
    clock, followed = ManualClock(), []

    def pause_and_be_followed(call: Call) -> bool:
        if call.name == "unlink" and call.path.endswith(".kv") and not followed:
            heir = Lease(witness.root, holder="b" * 32, clock=clock)
            assert not heir.acquire()
            clock.advance(PATIENCE_S)
            followed.append(heir.acquire())
        return False

    witness = open_store(index=None)
    calls = FaultyOs(RealOs(), When(fault=Cut(), matches=pause_and_be_followed))
    store_chain(witness, chain("a", BATCH_VICTIMS + 40))
    store = open_store(config=QUOTA, clock=clock, os_calls=calls, index=None)
    store.reconcile()
    new = chain("b", 1)
    assert store.store(chunk_at(new, 0), payload_of(new[0])).reason is SkipReason.QUOTA
    store.work()
    assert followed == [True]
    assert (store.counters()["evicted"], blobs(root)) == (BATCH_VICTIMS, 40)


def test_a_full_disk_is_evicted_from_without_a_lease(open_store: OpenStore, root: str) -> None:
    """Where there is no room for an epoch there is the more need to evict."""
    calls, clock = FaultyOs(RealOs()), ManualClock()
    store = open_store(config=QUOTA, clock=clock, os_calls=calls, index=None)
    store_chain(store, chain("a", 20))
    calls.reset(When(fault=Fail(errno.ENOSPC), name="write_from", forever=True))
    store.work()
    assert (blobs(root), store.counters()["evictions"]) == (17, 1)


@pytest.mark.parametrize("damage", ["a directory", "scan.json"])
def test_a_pass_that_cannot_end_is_made_no_more_often(
    open_store: OpenStore, root: str, damage: str
) -> None:
    """Nobody hears of it, and each is a scan of the whole tree; an eviction that is needed comes at once."""
    limits = LimitsDocument(max_age_s=5 * PASS_S, max_bytes=20 * FILE_BYTES)
    write_limits(Root.create(root), limits)
    clock, calls, keys = ManualClock(), FaultyOs(RealOs()), chain("a", 10)
    store = open_store(clock=clock, os_calls=calls, index=None)
    store_chain(store, keys)
    store.work()
    leaf = f"/{keys[3].hex()[:2]}/{keys[3].hex()[2:4]}"
    calls.reset(
        When(
            fault=Fail(errno.EIO),
            name="scan",
            matches=lambda c: c.path.endswith(leaf),
            forever=True,
        )
        if damage == "a directory"
        else When(
            fault=Fail(errno.ENOSPC),
            name="write_from",
            matches=lambda c: "scan.json" in c.path,
            forever=True,
        )
    )
    before = store.counters().get("evictions", 0)
    for _ in range(int(3 * PASS_S / LOOK_S)):
        clock.advance(LOOK_S)
        store.touch(keys)
        store._collector.look()
        store.work()
    assert 2 <= store.counters()["evictions"] - before <= 4

    store_chain(store, chain("b", 10))
    clock.advance(LOOK_S)
    store._collector.look()
    store.work()
    assert blobs(root) == 17


def test_a_disk_that_was_full_once_is_not_evicted_from_later(
    open_store: OpenStore, root: str
) -> None:
    """Where another host was at it then, and writes go well since."""
    write_limits(Root.create(root), LimitsDocument(max_age_s=100 * PASS_S))
    clock, calls = ManualClock(), FaultyOs(RealOs())
    store = open_store(clock=clock, os_calls=calls, index=None)
    store_chain(store, chain("a", 40))
    store.work()
    other = Lease(store.root, holder="b" * 32, clock=clock)
    assert other.acquire()
    calls.reset(When(fault=Fail(errno.ENOSPC), name="write_from", nth=1))
    assert store_chain(store, chain("b", 1))[0].reason is SkipReason.FULL
    store.work()
    other.release()
    clock.advance(60)
    assert store_chain(store, chain("c", 1))[0].published
    clock.advance(20 * PASS_S)
    store._collector.look()
    store.work()
    store._collector.want_eviction()
    store.work()
    assert (store.counters()["evictions"], blobs(root)) == (2, 41)


def test_a_pass_does_not_take_what_a_full_disk_asks_for(open_store: OpenStore, root: str) -> None:
    """It goes by the limits; the eviction that was asked for is still to come."""
    write_limits(Root.create(root), LimitsDocument(max_age_s=100 * PASS_S))
    calls = FaultyOs(RealOs())
    store = open_store(clock=ManualClock(), os_calls=calls, index=None)
    store_chain(store, chain("a", 40))
    store.work()
    calls.reset(When(fault=Fail(errno.ENOSPC), name="write_from", nth=1))
    assert store_chain(store, chain("b", 1))[0].reason is SkipReason.FULL
    report = store.collect()
    assert report is not None
    assert (report.evicted_chunks, blobs(root)) == (0, 40)
    store.work()
    assert blobs(root) == 34
