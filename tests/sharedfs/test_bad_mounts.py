"""Mounts that hang, vanish, or may only be read: the I/O client's calls all end, and hits come back."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from prefixstore.config import StoreConfig
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import Completion, FindDone, Limits, LoadDone, StoreDone, StoreTarget
from tests.ioproc.conftest import (
    FIELDS,
    PAYLOAD_BYTES,
    Slots,
    await_jobs,
    await_state,
    chain,
    payload,
    store_chain,
    wait_until,
)
from tests.sharedfs.gluster import Volume

LIMITS = Limits(
    buffer_count=6,
    buffer_bytes=PAYLOAD_BYTES,
    find_deadline_s=0.5,
    load_deadline_s=1.0,
    store_deadline_s=1.0,
    hang_s=2.0,
    breaker_s=0.3,
    processes_stuck_max=2,
)
"""The engine's, shortened so that a test sees each of them pass."""
SLACK_S = 1.5
"""What a busy machine adds to a deadline."""


@contextmanager
def client_of(root: Path, limits: Limits = LIMITS) -> Iterator[IoClient]:
    """Start a client of a root, as an engine does; closed at the end."""
    options = msgspec.json.encode(StoreConfig(miss_ttl_s=0.0))
    fields = msgspec.json.encode(FIELDS)
    client = IoClient(StoreTarget(root=str(root), namespace=fields, options=options), limits)
    try:
        yield client
    finally:
        client.close(2.0)


@pytest.fixture
def client(own_volume: Volume) -> Iterator[IoClient]:
    """Give a client on the mount ``a``, its store open."""
    with client_of(own_volume.mount("a").path / "root") as client:
        await_state(client, "on")
        yield client


def test_lookups_loads_and_stores_on_a_hung_mount_end_in_time(
    own_volume: Volume, client: IoClient
) -> None:
    """Each is answered within its deadline: missing, missed, skipped. Then all is as before."""
    keys = chain(4)
    store_chain(client, keys)
    with own_volume.mounts["a"].hanging():
        found, find_s = timed(client, lambda: client.find(1, chain(4, salt=1), chained=True))
        missed, load_s = timed(client, lambda: client.load(2, loads(keys)))
        skipped, store_s = timed(client, lambda: client.store(3, stores(chain(4, salt=2))))

    assert isinstance(found, FindDone)
    assert isinstance(missed, LoadDone)
    assert isinstance(skipped, StoreDone)
    assert (found.answered, found.present) == (False, [False] * 4)
    assert (missed.landed, set(missed.missed)) == ([], set(keys))
    assert (skipped.stored, len(skipped.skipped)) == ([], 4)
    assert find_s < LIMITS.find_deadline_s + SLACK_S
    assert load_s < LIMITS.load_deadline_s + SLACK_S
    assert store_s < LIMITS.store_deadline_s + SLACK_S
    assert_serves_again(client, keys)


def test_a_breaker_spares_requests_the_wait(own_volume: Volume, client: IoClient) -> None:
    """After one lookup has run out of time a client says that asking is no use, until it is again."""
    keys = chain(4)
    store_chain(client, keys)
    assert client.ready
    with own_volume.mounts["a"].hanging():
        timed(client, lambda: client.find(1, chain(4, salt=1), chained=True))
        assert not client.ready
    wait_until(lambda: client.ready, "the breaker to close")
    assert_serves_again(client, keys)


def test_processes_stuck_in_a_hung_mount_are_few_and_leave(
    own_volume: Volume, client: IoClient
) -> None:
    """A process that hangs is replaced, at most so often, and all are gone once the mount answers."""
    keys = chain(4)
    store_chain(client, keys)

    def stuck() -> int:
        return sum(not process.reaped() for process in client._pump._stuck)

    def load() -> None:
        client.load(1, loads(keys))

    most = 0
    with own_volume.mounts["a"].hanging(limit_s=30):
        end_s = time.monotonic() + 4 * LIMITS.hang_s
        while time.monotonic() < end_s:
            timed(client, load)
            most = max(most, stuck())
            time.sleep(0.05)
    assert most <= LIMITS.processes_stuck_max
    assert_serves_again(client, keys)
    wait_until(lambda: stuck() == 0, "the stuck processes to leave")


def test_draining_and_closing_on_a_hung_mount_end_in_time(
    own_volume: Volume, client: IoClient
) -> None:
    """An engine that shuts down while its mount hangs does so in seconds."""
    keys = chain(4)
    store_chain(client, keys)
    with own_volume.mounts["a"].hanging():
        client.load(1, loads(keys))
        client.store(2, stores(chain(4, salt=2)))
        start_s = time.monotonic()
        done = client.drain(0.5)
        drained_s = time.monotonic() - start_s
        client.close(1.0)
        closed_s = time.monotonic() - start_s - drained_s

    assert {type(completion) for completion in done} == {LoadDone, StoreDone}
    assert drained_s < 0.5 + SLACK_S
    # The time given, the process's own to leave, and twice that to be killed in.
    assert closed_s < 1.0 + LIMITS.hang_s + 3 * 1.0 + SLACK_S


def test_a_mount_that_hangs_from_the_start(own_volume: Volume) -> None:
    """An engine starts on a hung mount with its store off, and has it once the mount answers."""
    mount = own_volume.mount("a")
    with mount.hanging(), client_of(mount.path / "root") as client:
        found, find_s = timed(client, lambda: client.find(1, chain(2), chained=True))
        assert isinstance(found, FindDone)
        assert (found.answered, client.ready) == (False, False)
        assert find_s < LIMITS.find_deadline_s + SLACK_S
        mount.process.send_signal(signal.SIGCONT)
        await_state(client, "on")


def test_a_root_that_is_unmounted_and_mounted_again(own_volume: Volume, client: IoClient) -> None:
    """Misses while it is away, nothing written below the mount point, hits when it is back."""
    keys = chain(4)
    store_chain(client, keys)
    place = own_volume.mounts["a"].path
    options = own_volume.mounts["a"].options
    own_volume.unmount("a")
    missed, _ = timed(client, lambda: client.load(1, loads(keys)))
    skipped, _ = timed(client, lambda: client.store(2, stores(chain(4, salt=2))))
    assert isinstance(missed, LoadDone)
    assert isinstance(skipped, StoreDone)
    assert (missed.landed, skipped.stored) == ([], [])
    assert list(place.iterdir()) == []

    own_volume.mount("a", options)
    assert_serves_again(client, keys)


def test_an_io_process_that_starts_anew_makes_no_root_below_the_mount_point(
    own_volume: Volume, client: IoClient
) -> None:
    """A root that was there is waited for: an empty directory where it was mounted is not taken for new."""
    keys = chain(4)
    store_chain(client, keys)
    place, options = own_volume.mounts["a"].path, own_volume.mounts["a"].options
    own_volume.unmount("a")
    assert client._pump._process is not None
    os.kill(client._pump._process.pid, signal.SIGKILL)
    await_state(client, "off")
    wait_until(lambda: "root" in client.reason, f"the root to be missed, not: {client.reason}")
    assert list(place.iterdir()) == []

    own_volume.mount("a", options)
    assert_serves_again(client, keys)


def test_a_mount_that_loses_its_client_and_is_mounted_again(
    own_volume: Volume, client: IoClient
) -> None:
    """A mount whose process has died (ENOTCONN) makes misses; a new one in its place makes hits."""
    keys = chain(4)
    store_chain(client, keys)
    mount = own_volume.mounts["a"]
    mount.process.kill()
    mount.process.wait(5)
    missed, _ = timed(client, lambda: client.load(1, loads(keys)))
    assert isinstance(missed, LoadDone)
    assert (missed.landed, set(missed.missed)) == ([], set(keys))

    own_volume.remount("a")
    assert_serves_again(client, keys)


def test_a_read_only_mount_serves_and_stores_nothing(own_volume: Volume) -> None:
    """One host writes, another that mounted the same volume read-only has the hits, quietly."""
    keys = chain(4)
    with client_of(own_volume.mount("a").path / "root") as writer:
        await_state(writer, "on")
        store_chain(writer, keys)
    reading = own_volume.mount("b", ("--read-only",))
    before = sorted(own_volume.brick.glob("root/**/*"))
    with client_of(reading.path / "root") as reader:
        await_state(reader, "read_only")
        assert_serves_again(reader, keys)
        skipped, _ = timed(reader, lambda: reader.store(3, stores(chain(2, salt=2))))
        reader.touch(keys)

    assert isinstance(skipped, StoreDone)
    assert set(skipped.skipped.values()) == {"read_only"}
    assert sorted(own_volume.brick.glob("root/**/*")) == before


def timed(client: IoClient, submit: Callable[[], object]) -> tuple[Completion, float]:
    """Submit one job; return its completion and how long that took."""
    start_s = time.monotonic()
    submit()
    (done,) = await_jobs(client)
    return done, time.monotonic() - start_s


def loads(keys: list) -> list:
    """Describe loads into slots of their own."""
    slots = Slots()
    for at in range(len(keys)):
        slots.put(at, bytes(PAYLOAD_BYTES))
    return [slots.load(key, at) for at, key in enumerate(keys)]


def stores(keys: list) -> list:
    """Describe stores from slots of their own."""
    slots = Slots()
    for at in range(len(keys)):
        slots.put(at, payload(at))
    return [slots.store(key, at, end=16 * (at + 1)) for at, key in enumerate(keys)]


def assert_serves_again(client: IoClient, keys: list) -> None:
    """Wait until a chain that ``store_chain`` published is found, then load it and compare."""
    ticket = 10_000

    def finds() -> bool:
        nonlocal ticket
        ticket += 1
        found, _ = timed(client, lambda: client.find(ticket, keys, chained=True))
        return isinstance(found, FindDone) and found.present == [True] * len(keys)

    wait_until(finds, f"the chain to be found; the store is {client.state}: {client.reason}")
    slots = Slots()
    for at in range(len(keys)):
        slots.put(at, bytes(PAYLOAD_BYTES))
    chunks = [slots.load(key, at) for at, key in enumerate(keys)]
    loaded, _ = timed(client, lambda: client.load(20_000, chunks))
    assert isinstance(loaded, LoadDone)
    assert loaded.missed == {}
    assert {at: bytes(memory) for at, memory in slots.memory.items()} == {
        at: payload(at) for at in range(len(keys))
    }
