"""The background eviction of several hosts: one at a time, and none less for want of a lease."""

import errno
from collections.abc import Callable
from pathlib import Path

from prefixstore.store import PrefixStore, SkipReason
from prefixstore.store.evictor import BATCH_VICTIMS
from prefixstore.testing.chains import FILE_BYTES, chain, chunk_at, payload_of, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Cut, Fail, FaultyOs, When
from prefixstore.tree.lease import BEAT_S, PATIENCE_S, Lease
from prefixstore.tree.osfs import RealOs

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
