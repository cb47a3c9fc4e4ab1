"""Hosts that share a quota hear of each other's bytes, without a scan for every chunk."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from prefixstore.store import PrefixStore
from prefixstore.store.usage import FILE_KEPT_S, INTERVAL_S, REFRESH_S, ScanDocument
from prefixstore.testing.chains import FILE_BYTES, chain, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Cut, Fail, FaultyOs, When
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


def age(store: PrefixStore, *, by_s: float = FILE_KEPT_S + 60) -> Path:
    """Have the account of a store look as if it were still for a day; return its file."""
    (path,) = Path(store.root.layout.collector).glob(f"usage-{store.tree.writer}.json")
    then_s = time.time() - by_s
    os.utime(path, (then_s, then_s))
    return path


def collected(open_store: OpenStore, *, by: int) -> tuple[PrefixStore, PrefixStore, ManualClock]:
    """Return two hosts; the first has removed so many chunks that the second has stored, all met by a scan."""
    clock = ManualClock(start_s=time.time())
    one, two = host(open_store, clock), host(open_store, clock)
    for number in range(0, by, 25):
        keys = chain(f"old {number}", 25)
        assert all(outcome.published for outcome in store_chain(two, keys))
        tick(clock, two, one)
        one.remove(keys)
        tick(clock, one, two)
    two.reconcile()
    return one, two, clock


def tick(clock: ManualClock, *stores: PrefixStore) -> None:
    """Have each tell, and then hear of the others."""
    for _ in range(2):
        clock.advance(INTERVAL_S)
        for store in stores:
            store.work()


def test_an_idle_writer_is_not_forgotten(open_store: OpenStore) -> None:
    """It shows every hour that it lives, and costs nothing in between."""
    one, two, clock = collected(open_store, by=25)
    account = age(one)
    tick(clock, one)
    assert account.stat().st_mtime < time.time() - FILE_KEPT_S
    clock.advance(REFRESH_S)
    one.work()
    two.work()
    assert two._parts.usage.writers == 1, "one that only lives stores nothing"
    host(open_store, clock).collect()

    assert account.exists()
    assert (used(one), used(two)) == (0, 0)


@pytest.mark.parametrize("hands_on", [True, False])
def test_a_writer_that_was_stopped_for_a_day_takes_nothing_away_again(
    open_store: OpenStore, root: str, *, hands_on: bool
) -> None:
    """Its account is forgotten, and no scan knows it when it goes on: the root keeps to its quota."""
    one, two, clock = collected(open_store, by=150)
    account = age(one)
    three = host(open_store, clock)
    assert not account.exists()
    four = host(open_store, clock)
    scan = Path(root) / "collector" / "scan.json"
    if not hands_on:
        # As an earlier version writes it, or anybody who has never heard of that account.
        found = msgspec.json.decode(scan.read_bytes(), type=ScanDocument)
        for of_account in (found.stored, found.removed):
            of_account.pop(one.tree.writer, None)
        scan.write_bytes(msgspec.json.encode(found))
    one.remove(chain("nothing", 1))
    store_chain(one, chain("new", 5))
    tick(clock, one, two, three, four)

    assert [used(each) for each in (one, two, three, four)] == [5] * 4
    assert not account.exists()
    for number in range(80):
        clock.advance(INTERVAL_S)
        store_chain(three, chain(f"{number}", 1))
        three.work()
        assert blobs(root) <= 40


def test_an_account_that_is_told_while_it_is_forgotten_counts_what_no_scan_has_met(
    open_store: OpenStore, root: str
) -> None:
    """Between its writer's look and its telling it goes, and another host scans without it."""
    clock = ManualClock(start_s=time.time())
    calls = FaultyOs(QuickOs())
    one, two = host(open_store, clock, os_calls=calls), host(open_store, clock)
    keys = chain("old", 25)
    store_chain(two, keys)
    tick(clock, two, one)
    one.remove(keys)
    tick(clock, one, two)
    two.reconcile()
    forgotten: list[Call] = []

    def forget(call: Call) -> bool:
        if (
            call.name == "rename"
            and call.path.endswith(f"{one.tree.writer}.json")
            and not forgotten
        ):
            forgotten.append(call)
            Path(call.path).unlink()
            host(open_store, clock).reconcile()
        return False

    calls.reset(When(fault=Cut(), matches=forget))
    store_chain(one, chain("new", 5))
    tick(clock, one, two)

    assert len(forgotten) == 1
    # The scan has met the first chunk, which was not told yet: until the next one it counts twice.
    assert [used(each) for each in (one, two, host(open_store, clock))] == [6, 6, 5]
    tick(clock, one, two)
    assert [used(each) for each in (one, two)] == [5, 5]


def test_a_writer_whose_account_somebody_removed_tells_all_that_no_scan_has_met(
    open_store: OpenStore,
) -> None:
    """An operator who empties the directory costs no host its figures."""
    one, two, clock = collected(open_store, by=25)
    store_chain(one, chain("new", 5))
    tick(clock, one, two)
    for account in Path(one.root.layout.collector).glob("usage-*.json"):
        account.unlink()
    tick(clock, one, two)

    assert (used(one), used(two)) == (5, 5)


def test_a_mount_that_goes_away_forgets_no_account(open_store: OpenStore, root: str) -> None:
    """An empty directory in its place is no reason to begin another account."""
    one, two, clock = collected(open_store, by=25)
    store_chain(one, chain("new", 5))
    tick(clock, one, two)
    collector = Path(root) / "collector"
    collector.rename(Path(root) / "away")
    store_chain(one, chain("newer", 5))
    tick(clock, one)
    (Path(root) / "away").rename(collector)
    tick(clock, one, two)

    assert (used(one), used(two)) == (10, 10)
    assert (collector / f"usage-{one.tree.writer}.json").exists()


def test_a_writer_that_comes_back_while_it_is_forgotten_keeps_its_account(
    open_store: OpenStore,
) -> None:
    """Whoever forgets it looks once more."""
    one, _, clock = collected(open_store, by=25)
    account = age(one)
    looks: list[Call] = []

    def come_back(call: Call) -> bool:
        if call.name == "stat" and call.path == str(account):
            looks.append(call)
            if len(looks) == 2:
                account.touch()
        return False

    calls = FaultyOs(QuickOs(), When(fault=Cut(), matches=come_back))
    store = open_store(config=QUOTA, clock=clock, index=None, os_calls=calls, namespace=None)
    store._parts.usage.forget_old(server_now_s=time.time())
    assert account.exists()


def test_who_cannot_tell_hears_all_the_same(open_store: OpenStore, clock: ManualClock) -> None:
    """A host that may not write there knows what others store."""
    disk = FaultyOs(RealOs())
    one, two = host(open_store, clock), host(open_store, clock, os_calls=disk)
    store_chain(two, chain("a", 5))
    disk.plan = When(
        fault=Fail(errno.EACCES),
        forever=True,
        matches=lambda c: "/collector/" in c.path and c.name in ("touch", "rename"),
    )
    store_chain(one, chain("b", 5))
    tick(clock, one, two)

    assert used(two) == 10


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
