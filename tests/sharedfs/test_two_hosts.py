"""Two hosts, one root: what one publishes the other has, and nothing either does harms the other."""

import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import (
    FILE_BYTES,
    chain,
    chunk_at,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.faults import FaultyOs, Hang, When
from prefixstore.tree.osfs import RealOs
from tests.sharedfs.gluster import PREFIX, Volume
from tests.sharedfs.hosts import Hosts, until

LONG = 4096
PROBES_MAX = 32
"""A chain of 4096 is resolved by twice its logarithm, and some."""


def test_what_one_host_publishes_the_other_finds_and_loads(hosts: Hosts) -> None:
    """Also when the other has looked before, and has to forget that it was not there."""
    a, b, keys = hosts.store_on(hosts.a), hosts.store_on(hosts.b), chain("shared", 8)
    assert b.longest_prefix(keys) == 0

    store_chain(a, keys)
    until(lambda: b.longest_prefix(keys) == len(keys), within_s=hosts.fresh_s)

    assert [load(b, key) for key in keys] == [payload_of(key) for key in keys]


def test_a_host_that_comes_later_finds_at_once(hosts: Hosts) -> None:
    """What was never looked for is in no cache."""
    keys = chain("shared", 8)
    store_chain(hosts.store_on(hosts.a), keys)

    assert hosts.store_on(hosts.b).longest_prefix(keys) == len(keys)


def test_a_long_prefix_of_another_host_takes_few_probes(hosts: Hosts) -> None:
    """4096 chunks that the index has never seen cost dozens of calls, not thousands; then none."""
    a, keys = hosts.store_on(hosts.a), in_few_directories("long", LONG)
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda at: a.store(chunk_at(keys, at), payload_of(keys[at], 64)), range(LONG))
        )
    calls = FaultyOs(RealOs())
    b = hosts.store_on(hosts.b, os_calls=calls)
    calls.reset()

    assert b.longest_prefix([*keys, *chain("other", 8)]) == LONG
    cold = len(calls.calls)
    b.work()
    calls.reset()
    assert b.longest_prefix(keys) == LONG
    assert (cold <= PROBES_MAX, len(calls.calls) <= 1) == (True, True), (cold, calls.calls)


def test_two_hosts_that_publish_one_key_publish_it_once(hosts: Hosts) -> None:
    """Whoever is first wins, both report it published, and no file is left over."""
    a, b, keys = hosts.store_on(hosts.a), hosts.store_on(hosts.b), chain("race", 40)
    line = threading.Barrier(2)

    def publish(store: PrefixStore) -> list[bool]:
        existed = []
        for at, key in enumerate(keys):
            line.wait(30)
            outcome = store.store(chunk_at(keys, at), payload_of(key))
            assert outcome.published, outcome
            existed.append(outcome.existed)
        return existed

    with ThreadPoolExecutor(2) as pool:
        by_a, by_b = pool.map(publish, (a, b))

    winners = [a_existed + b_existed for a_existed, b_existed in zip(by_a, by_b, strict=True)]
    assert winners == [1] * len(keys)
    assert len(hosts.files("ns/*/*/*/*.kv")) == len(keys)
    assert hosts.files("ns/**/.*.tmp") == []
    assert [load(store, key) for store in (a, b) for key in keys] == [
        payload_of(key) for key in keys * 2
    ]


def test_two_hosts_that_make_one_directory(glusterfs: None, tmp_path: Path) -> None:
    """While a server with a disk makes it, both are told that it is there and that it is not."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=tmp_path.parents[1]))
    with closing(Volume(directory)) as volume:
        volume.start()
        roots = [volume.mount(name).path / "root" for name in ("a", "b")]
        hosts = Hosts(*roots, disk=volume.brick / "root")
        with hosts.opened:
            stores = [hosts.store_on(root) for root in roots]
            line, keys = threading.Barrier(2), chain("directories", 60)

            def publish(store: PrefixStore) -> list[str]:
                details = []
                for at, key in enumerate(keys):
                    line.wait(30)
                    details.append(store.store(chunk_at(keys, at), payload_of(key)).detail)
                return details

            with ThreadPoolExecutor(2) as pool:
                trouble = [line for lines in pool.map(publish, stores) for line in lines if line]
    assert trouble == []


def test_eviction_on_one_host_under_loads_on_the_other(hosts: Hosts) -> None:
    """Each load brings the very bytes of its key or a miss; no call fails otherwise."""
    a, b, keys = hosts.store_on(hosts.a), hosts.store_on(hosts.b), chain("evicted", 60)
    store_chain(a, keys)
    assert b.longest_prefix(keys) == len(keys)
    started, done = threading.Event(), threading.Event()

    def load_all_along() -> list[tuple[Key, bytes | str]]:
        seen = []
        while not done.is_set():
            for key in keys:
                seen.append((key, load(b, key)))
                started.set()
        return seen

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load_all_along) for _ in range(2)]
        assert started.wait(10)
        report = a.evict(20 * FILE_BYTES)
        done.set()
    seen = [outcome for future in loads for outcome in future.result()]

    assert (report.evicted_chunks, report.errors) == (40, ())
    wrong = [found for key, found in seen if found not in (payload_of(key), "absent")]
    assert wrong == []
    assert [load(a, key) for key in keys[:20]] == [payload_of(key) for key in keys[:20]]


def test_an_unlink_under_a_reader(hosts: Hosts) -> None:
    """A blob that goes while another host has it open is read whole, or is a miss."""
    (key,) = keys = chain("gone", 1)
    a = hosts.store_on(hosts.a)
    store_chain(a, keys)
    gate = threading.Event()
    calls = FaultyOs(RealOs(), When(fault=Hang(gate), name="read_into", matches=_is_blob))
    b = hosts.store_on(hosts.b, os_calls=calls)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, b, key)
        until(lambda: any(c.name == "read_into" and _is_blob(c) for c in calls.calls), within_s=10)
        assert a.remove(keys).evicted_chunks == 1
        gate.set()
        assert loading.result(30) in (payload_of(key), "absent")

    # The client may serve a name that it has cached; never other bytes.
    assert load(b, key) in (payload_of(key), "absent")
    until(lambda: load(b, key) == "absent", within_s=hosts.fresh_s)


def test_a_touch_takes_the_servers_time(hosts: Hosts) -> None:
    """A chunk used on one host is as young, on the server, as a file written there just now."""
    a, b, keys = hosts.store_on(hosts.a), hosts.store_on(hosts.b), chain("old", 3)
    store_chain(a, keys)
    assert b.namespace is not None
    paths = [hosts.file_of(key).relative_to(hosts.disk) for key in keys]
    for path in paths:
        os.utime(hosts.a / path, (1, 1))
    assert [b.tree.touch(b.namespace, key) for key in keys] == [True] * 3
    fresh = hosts.a / "fresh"
    fresh.touch()
    now_s = fresh.stat().st_mtime

    def ages_s() -> list[float]:
        return [now_s - (hosts.a / path).stat().st_mtime for path in paths]

    until(lambda: all(abs(age_s) < 5 for age_s in ages_s()), within_s=hosts.fresh_s)


def test_hosts_agree_on_which_chunk_is_oldest(hosts: Hosts) -> None:
    """A chain that only the other host reads outlives one that nobody does."""
    a, b = hosts.store_on(hosts.a), hosts.store_on(hosts.b, config={"touch_interval_s": 0})
    idle, read = chain("idle", 5), chain("read", 5)
    store_chain(a, read)
    store_chain(a, idle)
    for key in idle + read:
        os.utime(hosts.a / hosts.file_of(key).relative_to(hosts.disk), (1000, 1000))
    assert b.longest_prefix(read) == 5
    b.work()
    b.touch(read)
    b.work()

    # The collector's host: a third, that has nothing in any cache but what it scans.
    time.sleep(hosts.cache_s if hosts.cache_s < 2 else 0)
    collector = hosts.store_on(hosts.b)
    collector.evict(5 * FILE_BYTES)
    assert [hosts.file_of(key).exists() for key in idle] == [False] * 5
    assert [hosts.file_of(key).exists() for key in read] == [True] * 5


def test_past_the_page_cache_where_the_filesystem_allows(hosts: Hosts) -> None:
    """With direct_io on, a root either works or says at once that it cannot."""
    keys, config = chain("direct", 4), {"direct_io": "on"}
    try:
        a = hosts.store_on(hosts.a, config=config)
    except InvalidError:
        with pytest.raises(InvalidError, match="refuses O_DIRECT"):
            hosts.store_on(hosts.b, config=config)
        return
    b = hosts.store_on(hosts.b, config=config)
    store_chain(a, keys)

    assert [load(b, key) for key in keys] == [payload_of(key) for key in keys]
    assert (a.tree.direct_io, b.tree.direct_io) == (True, True)


def test_a_root_that_is_removed_is_unavailable_and_heals(hosts: Hosts, tmp_path: Path) -> None:
    """A root that is moved away makes misses and skipped stores, and works again when it is back."""
    a, b, keys = hosts.store_on(hosts.a), hosts.store_on(hosts.b), chain("moved", 4)
    store_chain(a, keys)
    away = hosts.a.with_name(hosts.a.name + "-away")
    hosts.a.rename(away)
    until(lambda: load(b, keys[0]) == "absent", within_s=hosts.fresh_s)
    new = chain("new", 1)
    assert not a.store(chunk_at(new, 0), payload_of(new[0])).published
    assert not hosts.a.exists()

    away.rename(hosts.a)
    until(lambda: load(b, keys[0]) == payload_of(keys[0]), within_s=hosts.fresh_s)
    until(
        lambda: a.store(chunk_at(new, 0), payload_of(new[0])).published, within_s=hosts.fresh_s + 2
    )


def test_a_manifest_is_made_once(hosts: Hosts) -> None:
    """Hosts that make the root and a namespace at the same moment agree on both."""
    line = threading.Barrier(2)

    def open_it(root: Path) -> tuple[str, str | None]:
        line.wait(10)
        store = hosts.store_on(root)
        return store.root.store_id, store.namespace

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(open_it, (hosts.a, hosts.b))
    assert one == other
    assert hosts.files("*.tmp") + hosts.files("ns/*/*.tmp") == []


def in_few_directories(name: str, length: int) -> list[Key]:
    """Return a chain whose keys begin alike, since making directories is not what is tested."""
    return [Key(bytes([at % 4, 0]) + key[2:]) for at, key in enumerate(chain(name, length))]


def _is_blob(call: object) -> bool:
    return getattr(call, "path", "").endswith(".kv")
