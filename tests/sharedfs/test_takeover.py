"""A collector that stands still in the middle of an eviction, is followed, and wakes."""

import os
import signal
import threading

from prefixstore.clock import SystemClock
from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.store.evictor import BATCH_VICTIMS
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, load, payload_of, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Cut, FaultyOs, When
from prefixstore.tree.lease import PATIENCE_S
from prefixstore.tree.osfs import RealOs
from tests.sharedfs.hosts import Hosts, until

CHUNKS = BATCH_VICTIMS + 60
QUOTA = {"max_bytes": 80 * FILE_BYTES}
TARGET = 68
"""85 % of the quota."""


class AheadClock(SystemClock):
    """The clock of a host that is three days ahead."""

    def wall_s(self) -> float:
        """Return the wrong time."""
        return super().wall_s() + 3 * 86400


def test_a_paused_collector_is_followed_and_does_no_harm(hosts: Hosts) -> None:
    """Its clock is days off, and it stands still for long: another host evicts, and it ends by itself."""
    keys = [Key(bytes([at % 4, 0]) + key[2:]) for at, key in enumerate(chain("takeover", CHUNKS))]
    store_chain(hosts.store_on(hosts.a), keys)
    paused = os.fork()
    if paused == 0:
        os._exit(_evict_and_stand_still(str(hosts.a)))
    try:
        stopped, status = os.waitpid(paused, os.WUNTRACED)
        assert (stopped, os.WIFSTOPPED(status)) == (paused, True)
        clock = ManualClock()
        heir = hosts.store_on(hosts.b, config=QUOTA, clock=clock)
        until(lambda: heir._collector._lease.sight() is not None, within_s=hosts.fresh_s)
        assert heir.collect() is None, "the paused one has the lease"
        clock.advance(PATIENCE_S + 1)
        # What the mount still cached a moment ago may change once, and the wait begins anew.
        if heir.collect() is None:
            clock.advance(PATIENCE_S + 1)
            assert heir.collect() is not None
        assert len(hosts.files("ns/*/*/*/*.kv")) == TARGET
    finally:
        os.kill(paused, signal.SIGCONT)
        woken = threading.Timer(60, os.kill, (paused, signal.SIGKILL))
        woken.start()
        _, status = os.waitpid(paused, 0)
        woken.cancel()
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(hosts.files("ns/*/*/*/*.kv")) == TARGET
    fresh = hosts.store_on(hosts.b)
    assert [load(fresh, key) for key in keys[:TARGET]] == [
        payload_of(key) for key in keys[:TARGET]
    ], "a chain is eaten from its end, by however many"


def _evict_and_stand_still(root: str) -> int:
    """Begin an eviction, stop after ten victims; go on when woken, and return 0 if all ended well."""
    unlinks = []

    def stand_still(call: Call) -> bool:
        if call.name == "unlink" and call.path.endswith(".kv"):
            unlinks.append(call.path)
            if len(unlinks) == 10:
                os.kill(os.getpid(), signal.SIGSTOP)
        return False

    calls = FaultyOs(RealOs(), When(fault=Cut(), matches=stand_still))
    config = StoreConfig.from_mapping(QUOTA)
    with PrefixStore.open(
        root,
        namespace=FIELDS,
        config=config,
        index=None,
        background=False,
        os_calls=calls,
        clock=AheadClock(),
    ) as store:
        report = store.collect()
    return 0 if report is not None and not report.errors else 1
