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


def used(store: PrefixStore) -> int | None:
    """Return how many chunks the root holds, as the store reckons; None if it cannot tell."""
    found = store._parts.usage.used_bytes()
    return None if found is None else sum(found.values()) // FILE_BYTES


def blobs(root: str) -> int:
    """Count the blobs in the tree, past every index."""
    return sum(1 for _ in Path(root).glob("ns/*/*/*/*.kv"))


def test_hosts_hear_of_each_other(open_store: OpenStore, clock: ManualClock) -> None:
    """What one stores and removes the other counts, a few seconds later."""
    one, two = host(open_store, clock), host(open_store, clock)
    two.work()
    keys = chain("a", 5)
    store_chain(one, keys)
    assert (used(one), used(two)) == (5, 0)
    clock.advance(INTERVAL_S)
    one.work()
    clock.advance(INTERVAL_S)
    two.work()
    assert (used(one), used(two)) == (5, 5)

    two.remove(keys[3:])
    clock.advance(INTERVAL_S)
    two.work()
    clock.advance(INTERVAL_S)
    one.work()
    assert (used(one), used(two)) == (3, 3)


def test_a_scan_mends_the_sum_for_all(open_store: OpenStore, clock: ManualClock) -> None:
    """Whoever scans: what was miscounted is right on every host afterwards."""
    one, two = host(open_store, clock), host(open_store, clock)
    keys = chain("a", 5)
    store_chain(one, keys)
    for key in keys[2:]:
        Path(one.root.layout.blob(one.namespace, key)).unlink()
    clock.advance(INTERVAL_S)
    one.work()
    assert used(one) == 5
    two.reconcile()
    clock.advance(INTERVAL_S)
    one.work()
    assert (used(one), used(two)) == (2, 2)

    store_chain(one, chain("b", 2))
    clock.advance(INTERVAL_S)
    one.work()
    clock.advance(INTERVAL_S)
    two.work()
    assert (used(one), used(two)) == (4, 4)


def test_what_happens_during_a_scan_errs_upwards(open_store: OpenStore, clock: ManualClock) -> None:
    """A chunk stored or removed while another host scans may count too much, never too little."""
    one, keys = host(open_store, clock), chain("a", 6)
    store_chain(one, keys[:3])
    seen: list[str] = []

    class Meanwhile(FaultyOs):
        """Lets the other host store and remove in the middle of the scan."""

        def scan(self, path: str):
            found = super().scan(path)
            if path.endswith(f"/{keys[1].hex()[:2]}") and not seen:
                seen.append(path)
                store_chain(one, keys)
                one.remove(keys[:2])
                clock.advance(INTERVAL_S)
                one.work()
            return found

    two = open_store(config=QUOTA, clock=clock, index=None, os_calls=Meanwhile(RealOs()))
    two.reconcile()
    assert seen != []
    assert (used(two) or 0) >= blobs(two.root.path) == 4
    one.reconcile()
    clock.advance(INTERVAL_S)
    two.work()
    assert (used(one), used(two)) == (4, 4)


def test_until_someone_has_scanned_the_index_is_asked(
    open_store: OpenStore, clock: ManualClock
) -> None:
    """A root without any figures is not taken for an empty one."""
    neighbour = open_store()
    store_chain(neighbour, chain("a", 39))
    neighbour.work()
    store = open_store(config=QUOTA, clock=clock)
    assert used(store) is None
    assert [each.published for each in store_chain(store, chain("b", 2))] == [True, False]


def test_processes_that_share_an_index_do_not_count_twice(
    open_store: OpenStore, clock: ManualClock
) -> None:
    """The rows of a neighbour on the same host are in the index, and count by its account alone."""
    one = open_store(config=QUOTA, clock=clock)
    two = open_store(config=QUOTA, clock=clock)
    store_chain(one, chain("a", 5))
    for _ in range(3):
        clock.advance(INTERVAL_S)
        one.work()
        two.work()

    assert (used(two), two.stats().chunks) == (5, 5)


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
    """Its account goes after a day, and not before a scan has met what it tells."""
    one, two = host(open_store, clock), host(open_store, clock)
    store_chain(one, chain("a", 5))
    one.close()
    accounts = Path(two.root.layout.collector)

    def forget() -> int | None:
        usage = two._parts.usage
        usage.forget_old(server_now_s=two._parts.membership.now_s() + FILE_KEPT_S + 60)
        clock.advance(INTERVAL_S)
        two.work()
        return used(two)

    clock.advance(INTERVAL_S)
    two.work()
    assert (used(two), forget(), len(list(accounts.glob("usage-*")))) == (5, 5, 1)
    two.reconcile()
    assert (forget(), len(list(accounts.glob("usage-*")))) == (5, 0)


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
    clock.advance(INTERVAL_S)
    two.work()

    assert used(two) == 5


def test_without_a_quota_no_accounts_are_kept(open_store: OpenStore, root: str) -> None:
    """Nobody would ask for them."""
    store = open_store()
    store_chain(store, chain("a", 5))
    store.work()
    store.close()

    assert list((Path(root) / "collector").glob("usage-*")) == []
