"""The collector's lease: hosts with clocks of their own, caches, pauses and deaths, on real files."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixstore.errors import FullError, UnavailableError
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.lease import BEAT_S, EPOCHS_KEPT, PATIENCE_S, Lease
from prefixstore.tree.osfs import RealOs, Stat
from prefixstore.tree.root import Root
from prefixstore.tree.writers import PRESUMED_DEAD_S, Writers, this_process

DAY_S = 86400.0
CACHE_S = 60.0
"""How long an NFS client may show an old time by default."""


@dataclass
class Server:
    """A file server with a clock that is right for nobody."""

    now_s: float = 1_000_000.0


@dataclass
class HostOs(QuickOs):
    """How one host sees the server: times are the server's, and believed for a while."""

    server: Server
    cache_s: float = 0.0
    cached: dict[str, tuple[float, Stat]] = field(default_factory=dict)

    def touch(self, path: str) -> None:
        """Set the server's time, and forget what was believed."""
        os.utime(path, (self.server.now_s, self.server.now_s))
        self.cached.pop(path, None)

    def stat(self, path: str) -> Stat:
        """Look, or remember a look of a moment ago."""
        seen_s, found = self.cached.get(path, (float("-inf"), None))
        if found is None or self.server.now_s - seen_s >= self.cache_s:
            found = super().stat(path)
            self.cached[path] = (self.server.now_s, found)
        return found


class Host:
    """One host: a lease, a clock days from the others', a pause."""

    def __init__(self, path: str, server: Server, *, offset_s: float, cache_s: float) -> None:
        self.path = path
        self.clock = ManualClock(start_s=1_700_000_000 + offset_s)
        self.calls = HostOs(server, cache_s)
        self.paused = False
        self.wants = False
        self.won: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Die without a word and come back as another writer; what was in memory is lost."""
        root = Root.create(self.path, os_calls=self.calls)
        self.lease = Lease(root, holder=uuid.uuid4().hex, clock=self.clock)

    def step(self) -> None:
        """Do what a running host does all the time: ask for what it wants, keep what it has."""
        if self.paused:
            return
        if self.lease.epoch:
            self.lease.renew()
        elif self.wants and self.lease.acquire():
            self.won.append(self.lease.epoch)


class Cluster:
    """Hosts on one root; time passes for all at the same rate."""

    def __init__(self, path: str, *, cache_s: float = 0.0) -> None:
        self.server = Server()
        self.hosts = [
            Host(path, self.server, offset_s=offset * DAY_S, cache_s=cache_s)
            for offset in (-3, 0, 400)
        ]

    def advance(self, duration_s: float) -> None:
        """Let time pass, in steps in which every running host acts."""
        while duration_s > 0:
            step_s = min(BEAT_S / 2, duration_s)
            duration_s -= step_s
            self.server.now_s += step_s
            for host in self.hosts:
                host.clock.advance(step_s)
            for host in self.hosts:
                host.step()


@pytest.fixture
def cluster(quick_path: Path) -> Cluster:
    """Return three hosts on a new root."""
    return Cluster(str(quick_path / "root"))


def test_one_host_at_a_time_holds_the_lease(cluster: Cluster) -> None:
    """The others are told at once, and have it when it is released."""
    a, b, c = (host.lease for host in cluster.hosts)
    assert [a.acquire(), b.acquire(), c.acquire()] == [True, False, False]
    cluster.advance(10 * PATIENCE_S)
    assert [b.acquire(), a.renew()] == [False, True]

    a.release()
    assert [b.acquire(), c.acquire(), a.acquire()] == [True, False, False]
    assert (a.epoch, b.epoch) == (0, 2)


def test_a_dead_holder_is_followed_in_bounded_time(cluster: Cluster) -> None:
    """Within the patience and the time between two looks, and not before."""
    dead, heir, _ = cluster.hosts
    assert dead.lease.acquire()
    dead.restart()
    waited_s = 0.0
    while not heir.lease.acquire():
        cluster.advance(BEAT_S)
        waited_s += BEAT_S
    assert PATIENCE_S <= waited_s <= PATIENCE_S + BEAT_S


def test_a_holder_that_was_paused_learns_that_it_was_followed(cluster: Cluster) -> None:
    """At its next step; it ends no epoch but its own, and claims no more than any other host."""
    paused, heir, third = cluster.hosts
    assert paused.lease.acquire()
    paused.paused = True
    assert not heir.lease.acquire()
    cluster.advance(PATIENCE_S)
    assert heir.lease.acquire()

    paused.paused = False
    assert (paused.lease.renew(), paused.lease.renew(), paused.lease.epoch) == (False, False, 0)
    paused.lease.release()
    assert [paused.lease.acquire(), third.lease.acquire()] == [False, False]
    assert heir.lease.renew()


def test_a_pause_that_nobody_used_costs_nothing(cluster: Cluster) -> None:
    """A holder that stood still for long goes on if nobody followed."""
    (host, *_) = cluster.hosts
    assert host.lease.acquire()
    host.paused = True
    cluster.advance(10 * PATIENCE_S)
    assert host.lease.renew()


def test_a_release_after_the_next_epoch_frees_nothing(cluster: Cluster) -> None:
    """A holder that wakes and ends its epoch without a look leaves the heir's alone."""
    paused, heir, third = cluster.hosts
    assert paused.lease.acquire()
    paused.paused = True
    assert not heir.lease.acquire()
    cluster.advance(PATIENCE_S)
    assert heir.lease.acquire()
    paused.lease.release()

    assert not third.lease.acquire()
    assert heir.lease.renew()


def test_a_beat_is_one_touch_in_ten_seconds(quick_path: Path) -> None:
    """Between two, asking costs no call at all."""
    calls, clock = FaultyOs(QuickOs()), ManualClock()
    lease = Lease(Root.create(str(quick_path / "r"), os_calls=calls), holder="a" * 32, clock=clock)
    assert lease.acquire()
    calls.reset()
    assert [lease.renew() for _ in range(1000)] == [True] * 1000
    assert calls.calls == []
    clock.advance(BEAT_S)
    assert lease.renew()
    assert (calls.count("touch"), len(calls.calls) < 10) == (1, True)


def test_old_epochs_are_forgotten(cluster: Cluster) -> None:
    """A root that is evicted from for years keeps a bounded number of files."""
    first, second, _ = cluster.hosts
    for _ in range(2 * EPOCHS_KEPT):
        for host in (first, second):
            assert host.lease.acquire()
            host.lease.release()
    files = [path.name for path in Path(first.lease._directory).iterdir()]
    assert len(files) == EPOCHS_KEPT
    assert max(files) == f"{4 * EPOCHS_KEPT:016x}.done"


def test_damage_and_strangers_hold_nobody_up_for_ever(cluster: Cluster) -> None:
    """An epoch that cannot be read is followed in time; names outside the grammar do not count."""
    (host, *_) = cluster.hosts
    directory = Path(host.lease._directory)
    (directory / f"{5:016x}.json").write_text("{")
    for stray in ("notes.json", "ffff.json", f"{9:016x}.json.bak"):
        (directory / stray).write_text("{}")
    assert not host.lease.acquire()
    cluster.advance(PATIENCE_S)
    assert host.lease.acquire()
    assert host.lease.epoch == 6


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("write_from", errno.ENOSPC, FullError),
        ("open", errno.EROFS, UnavailableError),
        ("scan", errno.EIO, UnavailableError),
    ],
)
def test_what_keeps_an_epoch_from_being_made_is_told(
    quick_path: Path, name: str, number: int, kind: type[Exception]
) -> None:
    """The caller decides: a full disk has to be evicted from without a lease."""
    calls = FaultyOs(QuickOs())
    root = Root.create(str(quick_path / "r"), os_calls=calls)
    lease = Lease(root, holder="a" * 32, clock=ManualClock())
    calls.reset(When(fault=Fail(number), name=name, forever=True))
    with pytest.raises(kind):
        lease.acquire()
    assert (lease.epoch, lease.renew()) == (0, False)
    calls.reset()
    assert lease.acquire()


@pytest.mark.parametrize("name", ["scan", "touch", "stat", "open"])
def test_a_beat_that_fails_ends_no_eviction(quick_path: Path, name: str) -> None:
    """Nobody can tell, so the holder goes on: at stake is work done twice."""
    calls, clock = FaultyOs(QuickOs()), ManualClock()
    lease = Lease(Root.create(str(quick_path / "r"), os_calls=calls), holder="a" * 32, clock=clock)
    assert lease.acquire()
    clock.advance(BEAT_S)
    calls.reset(When(fault=Fail(errno.EIO), name=name, forever=True))
    assert lease.renew()
    calls.reset()
    lease.release()
    assert lease.acquire()


def test_reaping_leaves_the_lease_alone(cluster: Cluster) -> None:
    """What looks for orphans takes half-written epochs of long ago, no others."""
    (host, *_) = cluster.hosts
    assert host.lease.acquire()
    directory = Path(host.lease._directory)
    half = directory / f"{9:016x}.json.{'a' * 32}.tmp"
    half.write_text("{")
    root = Root.open(host.path)
    now_s = half.stat().st_mtime + PRESUMED_DEAD_S + 1
    Writers(root, this=this_process()).reap(server_now_s=now_s, spare="")
    assert [path.name for path in directory.iterdir()] == [f"{1:016x}.json"]
    assert host.lease.renew()


@pytest.mark.crash
@pytest.mark.parametrize("work", [Lease.acquire, Lease.release], ids=["acquire", "release"])
def test_a_host_that_dies_at_any_call_is_followed(
    quick_path: Path, work: Callable[[Lease], object]
) -> None:
    """However far it came, the next host holds the lease within the patience."""
    number = 0
    while True:
        number += 1
        path = quick_path / f"root-{number}"
        calls = FaultyOs(QuickOs())
        clock = ManualClock()
        victim = Lease(Root.create(str(path), os_calls=calls), holder="a" * 32, clock=clock)
        if work is Lease.release:
            assert victim.acquire()
        calls.reset(When(fault=Fail(errno.ENOTCONN), number=number, forever=True))
        with contextlib.suppress(UnavailableError):
            work(victim)
        happened = len(calls.calls)
        heir = Lease(Root.open(str(path), os_calls=RealOs()), holder="b" * 32, clock=clock)
        if not heir.acquire():
            clock.advance(PATIENCE_S)
            assert heir.acquire(), number
        if happened < number:
            return


class LeaseMachine(RuleBasedStateMachine):
    """Hosts that cache, stand still and die, and what must hold all along."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))

    @initialize(cache_s=st.sampled_from([0.0, CACHE_S]))
    def start(self, cache_s: float) -> None:
        """Make a root with three hosts."""
        self.cluster = Cluster(str(self.directory / "root"), cache_s=cache_s)

    def host(self, number: int) -> Host:
        """Return a host by number."""
        return self.cluster.hosts[number]

    @rule(number=st.integers(0, 2))
    def want(self, number: int) -> None:
        """Reach the quota: ask for the lease from now on."""
        self.host(number).wants = True
        self.host(number).step()

    @rule(number=st.integers(0, 2))
    def finish(self, number: int) -> None:
        """End an eviction, also one that was taken over during a pause."""
        self.host(number).wants = False
        self.host(number).lease.release()

    @rule(number=st.integers(0, 2))
    def die(self, number: int) -> None:
        """Die without a word."""
        self.host(number).restart()

    @rule(number=st.integers(0, 2))
    def pause(self, number: int) -> None:
        """Stand still."""
        self.host(number).paused = True

    @rule(number=st.integers(0, 2))
    def wake(self, number: int) -> None:
        """Go on, and look at once, as before each step."""
        self.host(number).paused = False
        self.host(number).step()

    @rule(duration_s=st.sampled_from([1.0, BEAT_S, PATIENCE_S / 2, PATIENCE_S, 10 * PATIENCE_S]))
    def wait(self, duration_s: float) -> None:
        """Let time pass."""
        self.cluster.advance(duration_s)

    @precondition(lambda self: all(h.paused or not h.lease.epoch for h in self.cluster.hosts))
    @rule(number=st.integers(0, 2))
    def is_free_in_time(self, number: int) -> None:
        """Where no running host holds it, one that keeps asking has it within patience and caches."""
        host = self.host(number)
        host.paused, host.lease.epoch, host.wants = False, 0, True
        end_s = self.cluster.server.now_s + PATIENCE_S + CACHE_S + 2 * BEAT_S
        while not any(h.lease.epoch and not h.paused for h in self.cluster.hosts):
            assert self.cluster.server.now_s < end_s
            self.cluster.advance(BEAT_S)

    @invariant()
    def one_runs(self) -> None:
        """Of the hosts that run, one at most believes that it holds the lease; no epoch is won twice."""
        if hasattr(self, "cluster"):
            hosts = self.cluster.hosts
            assert sum(1 for host in hosts if host.lease.epoch and not host.paused) <= 1
            won = [epoch for host in hosts for epoch in host.won]
            assert len(won) == len(set(won))

    def teardown(self) -> None:
        """Remove the root."""
        shutil.rmtree(self.directory)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
