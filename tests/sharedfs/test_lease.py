"""The collector's lease between two mounts: caches and latencies that are real."""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefixstore.store import SkipReason
from prefixstore.testing.chains import FILE_BYTES, chain, chunk_at, payload_of
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.lease import BEAT_S, PATIENCE_S, Lease
from prefixstore.tree.root import Root
from tests.sharedfs.hosts import Hosts, until


def lease_on(root: Path, clock: ManualClock | None = None) -> Lease:
    """Return a host's lease; its clock stands still unless the test moves it."""
    return Lease(Root.create(str(root)), holder=uuid.uuid4().hex, clock=clock or ManualClock())


def test_two_hosts_that_claim_at_once(hosts: Hosts) -> None:
    """Each epoch is won by one host, and a host is never told that it won what another did."""
    leases = [lease_on(hosts.a), lease_on(hosts.b)]
    line = threading.Barrier(2)
    rounds = 25

    def claim(lease: Lease) -> list[int]:
        won = []
        for _ in range(rounds):
            line.wait(30)
            if lease.acquire():
                won.append(lease.epoch)
            line.wait(30)
            lease.release()
        return won

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(claim, leases)
    assert len({*one, *other}) == len(one) + len(other)
    assert len(one) + len(other) >= 1


def test_a_beat_is_seen_on_the_other_host(hosts: Hosts) -> None:
    """Within the time that its mount caches; so a patience beyond that never follows the living."""
    clock = ManualClock()
    holder, other = lease_on(hosts.a, clock), lease_on(hosts.b)
    assert holder.acquire()
    until(lambda: not other.acquire() and other.sight() is not None, within_s=hosts.fresh_s)
    before = other.sight()
    time.sleep(0.02)
    clock.advance(BEAT_S)
    assert holder.renew()
    until(lambda: other.sight() != before, within_s=hosts.fresh_s)
    assert hosts.fresh_s + BEAT_S < PATIENCE_S


def test_a_dead_holder_on_the_other_host_is_followed(hosts: Hosts) -> None:
    """A host that sees no change for the patience by its own clock holds the next epoch."""
    clock = ManualClock()
    paused, heir = lease_on(hosts.a), lease_on(hosts.b, clock)
    assert paused.acquire()
    until(lambda: not heir.acquire() and heir.sight() is not None, within_s=hosts.fresh_s)
    clock.advance(PATIENCE_S)
    # What the mount still cached a moment ago may change once, and the wait begins anew.
    if not heir.acquire():
        clock.advance(PATIENCE_S)
        assert heir.acquire()
    assert heir.epoch == 2
    until(lambda: not _goes_on(paused), within_s=hosts.fresh_s)
    assert heir.renew()


def test_a_released_lease_is_free_for_the_other_host(hosts: Hosts) -> None:
    """Without any patience."""
    holder, other = lease_on(hosts.a), lease_on(hosts.b)
    assert holder.acquire()
    until(lambda: not other.acquire() and other.sight() is not None, within_s=hosts.fresh_s)
    holder.release()
    until(other.acquire, within_s=hosts.fresh_s)


def test_two_hosts_at_their_quota_evict_one_at_a_time(hosts: Hosts) -> None:
    """Both store at once; the root stays within the quota and what is in flight, and settles below."""
    chunks = 60
    config = {"max_bytes": chunks * FILE_BYTES, "miss_ttl_s": 0}
    stores = [hosts.store_on(root, config=config, background=True) for root in (hosts.a, hosts.b)]
    most = 0

    def fill(number: int) -> None:
        store = stores[number]
        for name in range(8):
            keys = chain(f"{number}/{name}", 20)
            for at in range(len(keys)):
                outcome = store.store(chunk_at(keys, at), payload_of(keys[at]))
                assert outcome.published or outcome.reason is SkipReason.QUOTA, outcome
                time.sleep(0.005)

    with ThreadPoolExecutor(2) as pool:
        filling = [pool.submit(fill, number) for number in range(2)]
        while not all(future.done() for future in filling):
            most = max(most, len(hosts.files("ns/*/*/*/*.kv")))
            time.sleep(0.05)
        for future in filling:
            future.result()
    assert all(store.wait_idle(30) for store in stores)
    # Each host counts what it stores itself exactly, and learns with a scan what the other stored.
    assert most <= 2 * chunks
    stores[0].evict()
    assert len(hosts.files("ns/*/*/*/*.kv")) <= chunks


def _goes_on(lease: Lease) -> bool:
    """Have a holder whose clock stands still beat now."""
    assert isinstance(lease._clock, ManualClock)
    lease._clock.advance(BEAT_S)
    return lease.renew()
