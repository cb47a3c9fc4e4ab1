"""Hosts that share a quota hear of each other's bytes, without a scan for every chunk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.store import PrefixStore
from prefixstore.store.usage import FILE_KEPT_S, INTERVAL_S
from prefixstore.testing.chains import FILE_BYTES, chain, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]

QUOTA = {"max_bytes": 40 * FILE_BYTES}


@pytest.fixture
def clock() -> ManualClock:
    """Return the clock of all hosts of a test."""
    return ManualClock()


def host(open_store: OpenStore, clock: ManualClock, **arguments: object) -> PrefixStore:
    """Open the root as a host with an index of its own, whose first scan is done."""
    arguments.setdefault("os_calls", QuickOs())
    store = open_store(config=QUOTA, clock=clock, index=None, **arguments)
    store.work()
    return store


def others(store: PrefixStore) -> int:
    """Return by how many chunks others have changed the root, as the store has heard."""
    return store._parts.usage.others_bytes // FILE_BYTES


def blobs(root: str) -> int:
    """Count the blobs in the tree, past every index."""
    return sum(1 for _ in Path(root).glob("ns/*/*/*/*.kv"))


def test_hosts_hear_of_each_other(open_store: OpenStore, clock: ManualClock) -> None:
    """What one stores and removes the other counts, a few seconds later."""
    one, two = host(open_store, clock), host(open_store, clock)
    keys = chain("a", 5)
    store_chain(one, keys)
    clock.advance(INTERVAL_S)
    one.work()
    assert (others(one), others(two)) == (0, 0)
    two.work()
    assert (others(one), others(two)) == (0, 5)

    one.remove(keys[3:])
    clock.advance(INTERVAL_S)
    one.work()
    two.work()
    assert others(two) == 3


def test_a_scan_starts_the_sum_anew(open_store: OpenStore, clock: ManualClock) -> None:
    """What the index has met is counted once."""
    one, two = host(open_store, clock), host(open_store, clock)
    store_chain(one, chain("a", 5))
    clock.advance(INTERVAL_S)
    one.work()
    two.reconcile()
    assert (others(two), two.stats().chunks) == (0, 5)

    store_chain(one, chain("b", 2))
    clock.advance(INTERVAL_S)
    one.work()
    two.work()
    assert others(two) == 2


def test_processes_that_share_an_index_do_not_count_twice(
    open_store: OpenStore, clock: ManualClock
) -> None:
    """The rows of a neighbour on the same host are in the index already."""
    one = open_store(config=QUOTA, clock=clock)
    two = open_store(config=QUOTA, clock=clock)
    store_chain(one, chain("a", 5))
    for _ in range(3):
        clock.advance(INTERVAL_S)
        one.work()
        two.work()

    assert (others(two), two.stats().chunks) == (0, 5)


def test_two_hosts_keep_to_one_quota(open_store: OpenStore, clock: ManualClock, root: str) -> None:
    """Each stores less than the quota; together they would hold twice as much."""
    hosts = [host(open_store, clock), host(open_store, clock)]
    for number in range(70):
        clock.advance(INTERVAL_S)
        store_chain(hosts[number % 2], chain(str(number), 1))
        for each in hosts:
            each.work()
        assert blobs(root) <= 40

    assert blobs(root) >= 34
    evictions = sum(each.counters().get("evictions", 0) for each in hosts)
    assert 5 <= evictions <= 20


def test_a_host_that_left_still_counts(open_store: OpenStore, clock: ManualClock) -> None:
    """Until the others have scanned, or a day has passed."""
    one, two = host(open_store, clock), host(open_store, clock)
    store_chain(one, chain("a", 5))
    one.close()
    clock.advance(INTERVAL_S)
    two.work()
    assert others(two) == 5

    usage = two._parts.usage
    usage.forget_old(server_now_s=two._parts.membership.now_s() + FILE_KEPT_S)
    clock.advance(INTERVAL_S)
    two.work()
    assert others(two) == 0


def test_a_root_that_cannot_be_written_costs_nothing(
    open_store: OpenStore, clock: ManualClock
) -> None:
    """Accounts are a convenience: without them each host counts what it knows."""
    disk = FaultyOs(RealOs())
    store = host(open_store, clock, os_calls=disk)
    store_chain(store, chain("a", 5))
    disk.plan = When(fault=Fail(28), forever=True, matches=lambda call: "/collector/" in call.path)
    clock.advance(INTERVAL_S)
    store.work()

    assert store.stats().chunks == 5


def test_damaged_and_foreign_files_are_passed_over(
    open_store: OpenStore, clock: ManualClock, root: str
) -> None:
    """Whatever lies in the directory, the sum is that of the accounts that can be read."""
    one, two = host(open_store, clock), host(open_store, clock)
    store_chain(one, chain("a", 5))
    clock.advance(INTERVAL_S)
    one.work()
    collector = Path(root) / "collector"
    (collector / f"usage-{'0' * 32}.json").write_text("{")
    (collector / "usage-mine.json").write_text("{}")
    (collector / f"usage-{'1' * 32}.json").symlink_to("/etc/passwd")
    two.work()

    assert others(two) == 5


def test_without_a_quota_no_accounts_are_kept(open_store: OpenStore, root: str) -> None:
    """Nobody would ask for them."""
    store = open_store()
    store_chain(store, chain("a", 5))
    store.work()
    store.close()

    assert list((Path(root) / "collector").glob("usage-*")) == []
