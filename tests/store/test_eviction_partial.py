"""Eviction where the index and the tree disagree: half an index, files that are no blobs, failed scans."""

import os
from collections.abc import Callable, Iterable
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
from prefixstore.testing.chains import (
    FILE_BYTES,
    chain,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.clock import ManualClock
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
