"""Eviction where the index and the tree disagree: half an index, files that are no blobs, failed scans."""

import errno
import os
import random
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.index.base import Entry
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.keys import Key
from prefixstore.ops.export import select
from prefixstore.ops.removal import plan_removal
from prefixstore.ops.removal_chains import plan_chains
from prefixstore.ops.repair import plan_repair
from prefixstore.store import PrefixStore
from prefixstore.store.hints import PARTIAL
from prefixstore.store.reconcile import HIDDEN_MAX
from prefixstore.testing.chains import (
    FILE_BYTES,
    chain,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Fail, FaultyOs, When
from prefixstore.testing.hosts import HostOs, Server
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]


def there(store: PrefixStore, keys: list[Key]) -> list[bool]:
    """Return for each key whether its blob lies in the tree, past every index."""
    assert store.namespace is not None
    return [Path(store.root.layout.blob(store.namespace, key)).exists() for key in keys]


def test_an_index_without_room_for_the_root_evicts_the_oldest_all_the_same(
    open_store: OpenStore,
) -> None:
    """What has no row is counted as used, and what has one is what goes first."""
    writer = open_store(index=None)
    chains = [chain(str(number), 4) for number in range(25)]
    for number, keys in enumerate(chains):
        store_chain(writer, keys)
        for key in keys:
            os.utime(writer.root.layout.blob(str(writer.namespace), key), (1e9 + number,) * 2)
    small = open_store(index=MemoryIndex(rows_max=40))
    report = small.evict(80 * FILE_BYTES)

    assert report.evicted_chunks == 20
    assert report.errors == (PARTIAL,)
    assert [sum(there(writer, keys)) for keys in chains] == [0] * 5 + [4] * 20


def orphans(store: PrefixStore, chains: list[list[Key]]) -> int:
    """Count the chunks that are there without the one before them."""
    each = [there(store, keys) for keys in chains]
    return sum(child and not parent for found in each for parent, child in pairwise(found))


@pytest.mark.parametrize("seed", range(4))
def test_half_an_index_evicts_no_parent_of_a_chunk_that_it_has_forgotten(
    open_store: OpenStore, seed: int
) -> None:
    """Conversations go on, and touches on disk are sampled: parents look older than what follows them."""
    lot = random.Random(seed)
    writer, chains = open_store(index=None), []
    for number in range(60):
        keys, used_s = chain(f"{seed}/{number}", 8), 1e9 + 60 * number
        store_chain(writer, keys)
        chains.append(keys)
        for at, key in enumerate(keys):
            used_s += lot.choice([0, 300, 900]) if at and not at % 2 else 0
            os.utime(writer.root.layout.blob(str(writer.namespace), key), (used_s, used_s))
    small = open_store(index=MemoryIndex(rows_max=120))
    for _ in range(4):
        report = small.evict(300 * FILE_BYTES)

    assert report.short_bytes == 0, "it frees what it is to free all the same"
    assert sum(sum(there(writer, keys)) for keys in chains) == 300
    assert orphans(writer, chains) == 0


def test_an_index_has_room_again_once_the_root_has_shrunk(open_store: OpenStore) -> None:
    """That it once had to forget says nothing of what a later scan finds."""
    writer = open_store(index=None)
    for number in range(30):
        store_chain(writer, chain(str(number), 2))
    small = open_store(index=MemoryIndex(rows_max=50))

    assert small.evict(20 * FILE_BYTES).errors == (PARTIAL,)
    assert small.evict(20 * FILE_BYTES).errors == ()
    assert small.stats().complete
    assert len(select(small).chunks) == 20


def test_an_index_that_was_whole_says_when_it_is_not_any_more(open_store: OpenStore) -> None:
    """The root has outgrown it since."""
    writer, small = open_store(index=None), open_store(index=MemoryIndex(rows_max=50))
    store_chain(writer, chain("a", 40))
    small.reconcile()
    assert small.stats().complete
    store_chain(writer, chain("b", 40))
    small.reconcile()

    assert not small.stats().complete


def test_the_first_scan_of_an_index_without_room_for_the_root_ends(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for one that was cut short, over and over, for as long as the engine runs."""
    monkeypatch.setattr("prefixstore.store.reconcile.CURSOR_DIRECTORIES", 1)
    store_chain(open_store(index=None), chain("a", 100))
    store = open_store(index=MemoryIndex(rows_max=40), config={"max_bytes": 1000 * FILE_BYTES})
    store.reconcile()
    reconcile, scans = store._evictor.reconcile, iter(range(3))

    def counted(**arguments: object) -> object:
        next(scans)
        return reconcile(**arguments)

    monkeypatch.setattr(store._evictor, "reconcile", counted)
    store.work()

    assert next(scans) == 1, "one scan, from the start to the end"
    assert store.counters().get("background_failures", 0) == 0


def test_no_plan_for_people_is_made_of_half_a_root(open_store: OpenStore) -> None:
    """An index that does not hold all of a root says so; exports, removals and repairs are refused."""
    store_chain(open_store(index=None), chain("a", 100))
    small = open_store(index=MemoryIndex(rows_max=40))

    assert PARTIAL in small.reconcile().errors
    assert not small.stats().complete
    for plan in (
        lambda: select(small),
        lambda: plan_removal(small, namespace=small.namespace, keys=None),
        lambda: plan_chains(small, {}),
    ):
        with pytest.raises(InvalidError, match="index_dir"):
            plan()
    assert PARTIAL in plan_repair(small).errors


@pytest.mark.parametrize("content", [bytes(FILE_BYTES), bytes(100)], ids=["whole", "short"])
def test_files_that_are_no_blobs_leave_the_quota_to_the_others(
    open_store: OpenStore, content: bytes
) -> None:
    """They take room and cannot be planned for: stores must not wait for room that others could make."""
    clock = ManualClock()
    store, bad = open_store(index=None, clock=clock), chain("bad", 8)
    store_chain(store, bad)
    for key in bad:
        Path(store.root.layout.blob(str(store.namespace), key)).write_bytes(content)
    store = open_store(config={"max_bytes": 20 * FILE_BYTES}, index=None, clock=clock)
    outcomes = []
    for number in range(40):
        clock.advance(60)
        outcomes += store_chain(store, chain(str(number), 1))
        store.work()

    assert [outcome for outcome in outcomes if not outcome.published] == []
    blobs = list(Path(store.root.path).glob("ns/*/*/*/*.kv"))
    assert sum(path.stat().st_size for path in blobs) <= 20 * FILE_BYTES


@pytest.mark.parametrize("age_s", [7200, 60], ids=["old", "young"])
def test_torn_files_that_have_rows_take_no_room_twice(open_store: OpenStore, age_s: int) -> None:
    """What the rows still say of them is not true any more; sound chunks must not go for that."""
    store, bad = open_store(index=MemoryIndex()), chain("bad", 10)
    good = [chain(str(number), 1)[0] for number in range(20)]
    for number in range(20):
        store_chain(store, chain(str(number), 1))
    store_chain(store, bad)
    store.reconcile()
    now_s = store.server_now_s()
    for key in good:
        os.utime(store.root.layout.blob(str(store.namespace), key), (1e9, 1e9))
    for key in bad:
        path = Path(store.root.layout.blob(str(store.namespace), key))
        path.write_bytes(b"")
        os.utime(path, (now_s - age_s,) * 2)
    report = store.evict(20 * FILE_BYTES)

    assert report.evicted_chunks == 0
    assert there(store, good) == [True] * 20
    assert there(store, bad) == [age_s < 3600] * 10
    rows = store.hints.get_many(str(store.namespace), bad)
    assert [row is None for row in rows] == [age_s > 3600] * 10


def test_an_eviction_after_its_dry_run_knows_what_the_scan_has_met(open_store: OpenStore) -> None:
    """Files without a row take room then, too, and torn ones go."""
    writer, torn, damaged = open_store(index=None), chain("torn", 5), chain("damaged", 5)
    for keys in (torn, damaged, *(chain(str(number), 1) for number in range(20))):
        store_chain(writer, keys)
    for key in (*torn, *damaged):
        path = Path(writer.root.layout.blob(str(writer.namespace), key))
        path.write_bytes(bytes(FILE_BYTES if key in damaged else 4000))
        os.utime(path, (1e9, 1e9))
    tool = open_store(namespace=None)
    planned = tool.evict(15 * FILE_BYTES, dry_run=True)
    assert there(writer, torn) == [True] * 5, "a dry run removes nothing"
    done = tool.evict(15 * FILE_BYTES, scan=False)

    assert (planned.planned_chunks, done.evicted_chunks) == (12, 10)
    assert (there(writer, torn), there(writer, damaged)) == ([False] * 5, [True] * 5)
    blobs = list(Path(writer.root.path).glob("ns/*/*/*/*.kv"))
    assert sum(path.stat().st_size for path in blobs) == 15 * FILE_BYTES


def directory_of(store: PrefixStore, key: Key) -> str:
    """Return the directory that a blob lies in."""
    return str(Path(store.root.layout.blob(str(store.namespace), key)).parent)


def failing(name: str, paths: set[str]) -> When:
    """Say that one call fails for some paths, for ever: a bad disk."""

    def is_one(call: Call) -> bool:
        return call.path in paths

    return When(fault=Fail(errno.EIO), name=name, matches=is_one, forever=True)


def test_an_eviction_passes_over_a_directory_that_cannot_be_read(open_store: OpenStore) -> None:
    """A fresh host must not leave a root full until somebody has mended a disk; it says what is wrong."""
    writer, chains = open_store(index=None), [chain(str(number), 8) for number in range(10)]
    for at, keys in enumerate(chains):
        store_chain(writer, keys)
        for key in keys:
            os.utime(writer.root.layout.blob(str(writer.namespace), key), (1e9 + at,) * 2)
    bad = directory_of(writer, chains[5][7])
    store = open_store(index=None, os_calls=FaultyOs(RealOs(), failing("scan", {bad})))
    report = store.evict(20 * FILE_BYTES)

    assert len(report.errors) == 1
    assert bad in report.errors[0]
    assert [sum(there(writer, keys)) for keys in chains] == [0] * 5 + [1, 0, 4, 8, 8]
    assert not store.stats().complete


def test_what_is_known_of_a_directory_that_cannot_be_read_stays_known(
    open_store: OpenStore,
) -> None:
    """That a disk fails is no word of what has gone."""
    keys, disk = chain("a", 20), FaultyOs(RealOs())
    store = open_store(index=None, os_calls=disk)
    store_chain(store, keys)
    store.reconcile()
    bad = directory_of(store, keys[3])
    # Its blobs cannot be looked at, either.
    blobs = {store.root.layout.blob(str(store.namespace), key) for key in keys}
    disk.plan = [failing("scan", {bad}), failing("stat", {b for b in blobs if b.startswith(bad)})]
    report = store.reconcile()

    assert (report.finished, report.cut_short, report.hidden, report.removed) == (
        False,
        False,
        1,
        0,
    )
    assert all(store.contains(keys))


@pytest.mark.parametrize("call", ["scan", "open"])
def test_a_host_that_can_read_little_evicts_nothing(open_store: OpenStore, call: str) -> None:
    """Of what it cannot see any number of chunks may follow what it sees."""
    writer, keys = open_store(index=None), chain("a", 80)
    store_chain(writer, keys)
    bad = {
        directory_of(writer, key)
        if call == "scan"
        else writer.root.layout.blob(str(writer.namespace), key)
        for key in keys[: 2 * HIDDEN_MAX]
    }
    store = open_store(index=None, os_calls=FaultyOs(RealOs(), failing(call, bad)))
    report = store.evict(0)

    assert report.errors
    assert there(writer, keys) == [True] * 80


def test_a_header_that_cannot_be_read_is_told(open_store: OpenStore) -> None:
    """The chunk is not known, and somebody should hear why."""
    writer, keys = open_store(index=None), chain("a", 8)
    store_chain(writer, keys)
    bad = writer.root.layout.blob(str(writer.namespace), keys[5])
    store = open_store(index=None, os_calls=FaultyOs(RealOs(), failing("open", {bad})))
    report = store.reconcile()

    assert len(report.errors) == 1
    assert "EIO" in report.errors[0]
    assert (report.hidden, report.unindexed.total()) == (1, FILE_BYTES)


class Late(HostOs):
    """A client that believes what opening a file told it, and is overtaken when its scan has ended."""

    overtake: Callable[[], object] = list

    def close(self, fd: int) -> None:
        """Close a file, and remember its attributes."""
        path = self._paths.get(fd)
        super().close(fd)
        if path is not None and path.endswith(".kv"):
            self._stats[path] = (self._server.now_s(), RealOs.stat(self, path))

    def rename(self, source: str, target: str) -> None:
        """Rename; the figures of a scan are told at its end."""
        super().rename(source, target)
        if target.endswith("scan.json"):
            self.overtake()


def test_a_torn_file_that_was_replaced_since_the_scan_stays(open_store: OpenStore) -> None:
    """Its length is asked of the server: a client may remember the torn one's for a minute."""
    server = Server()
    late = Late(server, cache_s=30.0)
    slow = open_store(
        index=None, os_calls=late, clock=server.clock, config={"max_bytes": 100 * FILE_BYTES}
    )
    other = open_store(index=None, os_calls=HostOs(server, cache_s=0.0), clock=server.clock)
    (key,) = keys = chain("torn", 1)
    store_chain(other, keys)
    path = Path(other.root.layout.blob(str(other.namespace), key))
    path.write_bytes(b"")
    os.utime(path, (server.now_s() - 7200,) * 2)
    late.overtake = lambda: store_chain(other, keys)
    slow.evict()

    assert load(other, key) == payload_of(key)


class FailingIndex(MemoryIndex):
    """An index that fails once, after it has been told of some chunks."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self._left = after

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Learn, until it fails."""
        self._left -= 1
        if self._left < 0:
            raise UnavailableError("the index's disk is full")
        super().put_many(entries)


@pytest.mark.parametrize("after", range(4))
def test_an_index_that_fails_in_a_scan_costs_no_chunk_its_parent(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The empty one in its place is told of everything before anything goes."""
    monkeypatch.setattr("prefixstore.store.reconcile.PUT_ROWS", 1)
    keys = chain("a", 40)
    store_chain(open_store(index=None), keys)
    store = open_store(index=FailingIndex(after=10 * after))
    store.evict(20 * FILE_BYTES)

    assert there(store, keys) == [True] * 20 + [False] * 20
