"""The time that a store goes by: the file server's, whatever clock its own host has."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from prefixstore.clock import SystemClock
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import chain, load, payload_of, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]

AHEAD_S = 2 * 86400.0


class DatedByWriter(RealOs):
    """Dates what is written by the clock of the host that writes, as GlusterFS does with ctime."""

    def close(self, fd: int) -> None:
        """Give a file that was written the writer's time."""
        if _is_written(fd):
            now_s = time.time() + AHEAD_S
            os.utime(fd, (now_s, now_s))
        super().close(fd)


def _is_written(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def test_a_host_whose_clock_is_days_off_goes_by_the_servers(open_store: OpenStore) -> None:
    """From its first announcement on, ahead or behind."""
    for offset_s in (AHEAD_S, -AHEAD_S):
        clock = ManualClock(start_s=time.time() + offset_s)
        store = open_store(clock=clock, index=None)
        store_chain(store, chain(f"{offset_s}", 1))
        assert abs(store._parts.membership.now_s() - time.time()) < 5


def test_a_filesystem_that_dates_files_by_their_writer_misleads_nobody(
    open_store: OpenStore,
) -> None:
    """The server's time is learnt from a touch, which only the server dates."""
    clock = ManualClock(start_s=time.time() + AHEAD_S)
    store = open_store(clock=clock, index=None, os_calls=DatedByWriter())
    (key,) = keys = chain("dated", 1)
    store_chain(store, keys)
    path = Path(store.root.layout.blob(store.namespace, key))
    assert path.stat().st_mtime > time.time() + AHEAD_S / 2
    assert abs(store._parts.membership.now_s() - time.time()) < 5


def test_a_pin_of_a_host_that_did_not_know_the_time_is_held(open_store: OpenStore) -> None:
    """A host that took a pin for ended, by its own clock, keeps it once it goes by the server's."""
    ahead = open_store(clock=ManualClock(start_s=time.time() + AHEAD_S), index=None)
    (key,) = keys = chain("pinned", 1)
    store_chain(open_store(index=None), keys)
    ahead.pin("for-an-hour", keys, ends_at_s=int(time.time()) + 3600)

    assert ahead.evict(0).evicted_chunks == 0
    assert load(ahead, key) == payload_of(key)
    late = open_store(clock=ManualClock(start_s=time.time() + AHEAD_S), index=None)
    assert late.remove(keys).kept == {"pinned": 1}


def test_while_the_time_cannot_be_learnt_every_pin_holds(open_store: OpenStore) -> None:
    """A full disk takes no file to learn it from, and is evicted from all the same, but for what is pinned."""
    pinned, free = chain("pinned", 2), chain("free", 2)
    store = open_store(index=None)
    store_chain(store, pinned)
    store_chain(store, free)
    store.pin("for-an-hour", pinned, ends_at_s=int(time.time()) + 3600)
    disk = FaultyOs(RealOs())
    ahead = open_store(
        clock=ManualClock(start_s=time.time() + AHEAD_S),
        os_calls=disk,
        index=None,
        background=False,
    )
    disk.reset(When(fault=Fail(errno.ENOSPC), name="write_from", forever=True))

    assert ahead.evict(0).evicted_chunks == 2
    assert [load(store, key) for key in pinned] == [payload_of(key) for key in pinned]
    assert [pin.name for pin in store.pins()] == ["for-an-hour"]


def test_a_host_that_did_not_know_the_time_goes_on_touching(open_store: OpenStore) -> None:
    """What a host whose clock is ahead has used once it touches again, an interval later."""
    clock = ManualClock(start_s=time.time() + AHEAD_S)
    ahead = open_store(clock=clock, index=None, config={"touch_interval_s": 600})
    (key,) = keys = chain("used", 1)
    store_chain(open_store(index=None), keys)
    assert ahead.longest_prefix(keys) == 1
    path = Path(ahead.root.layout.blob(ahead.namespace, key))
    for _ in range(2):
        os.utime(path, (1, 1))
        ahead.touch(keys)
        ahead.work()
        assert path.stat().st_mtime > 1
        clock.advance(1000)


class Adjusted(SystemClock):
    """A host's clock that somebody sets anew."""

    def __init__(self) -> None:
        self.set_by_s = 0.0

    def wall_s(self) -> float:
        """Return the time as it was set."""
        return super().wall_s() + self.set_by_s


def test_setting_a_hosts_clock_makes_nothing_old_and_ends_no_pin(open_store: OpenStore) -> None:
    """Once the server's time is known, it goes on whatever the wall clock does."""
    clock = Adjusted()
    store = open_store(clock=clock, index=None)
    keys, pinned = chain("young", 3), chain("pinned", 3)
    store_chain(store, keys)
    store_chain(store, pinned)
    store.pin("for-a-day", pinned, ends_at_s=store.server_now_s() + 86400)
    for step_s in (30 * 86400.0, -30 * 86400.0):
        clock.set_by_s = step_s
        assert store.evict(max_age_s=86400.0).evicted_chunks == 0
        assert store.evict(0, dry_run=True).planned_chunks == 3
