"""What happens while an eviction is under way: chunks are used and stored, and the index is lost."""

import os
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from prefixstore.errors import UnavailableError
from prefixstore.index.base import Entry
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.keys import Key
from prefixstore.ops.export import select
from prefixstore.ops.removal import plan_removal
from prefixstore.ops.removal_chains import plan_chains
from prefixstore.store import PrefixStore
from prefixstore.store.hints import LOST
from prefixstore.testing.chains import FILE_BYTES, chain, chunk_at, load, payload_of, store_chain

OpenStore = Callable[..., PrefixStore]


def there(store: PrefixStore, keys: list[Key]) -> list[bool]:
    """Return for each key whether its blob lies in the tree, past every index."""
    assert store.namespace is not None
    return [Path(store.root.layout.blob(store.namespace, key)).exists() for key in keys]


def orphans(store: PrefixStore, chains: list[list[Key]]) -> int:
    """Count the chunks that are there without the one before them."""
    each = [there(store, keys) for keys in chains]
    return sum(child and not parent for found in each for parent, child in pairwise(found))


def old_chain(open_store: OpenStore, length: int) -> list[Key]:
    """Store a chain that nobody has used for long."""
    writer, keys = open_store(index=None), chain("a", length)
    store_chain(writer, keys)
    for key in keys:
        os.utime(writer.root.layout.blob(str(writer.namespace), key), (1e9, 1e9))
    return keys


def between_plan_and_removal(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]
) -> None:
    """Have something happen after an eviction has made its plan."""
    pins, looks = store._parts.pins, iter(range(1000))
    held = pins.held

    def held_then(*, now_s: int) -> dict[tuple[str, Key], int]:
        if next(looks) == 1:
            do()
        return held(now_s=now_s)

    monkeypatch.setattr(pins, "held", held_then)


def test_a_chunk_that_is_stored_meanwhile_keeps_what_it_follows(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has just hit the chain's end and gone on from there."""
    stored = old_chain(open_store, 4)
    store, keys = open_store(index=None), chain("a", 5)
    between_plan_and_removal(
        store, monkeypatch, lambda: store.store(chunk_at(keys, 4), payload_of(keys[4]))
    )
    report = store.evict(FILE_BYTES)

    assert report.planned_chunks == len(stored) - 1
    assert there(store, keys) == [True] * 5


def test_a_chunk_that_is_loaded_meanwhile_keeps_itself_and_what_it_follows(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in use, whatever the plan says."""
    keys = old_chain(open_store, 4)
    store = open_store(index=None)
    between_plan_and_removal(store, monkeypatch, lambda: load(store, keys[2]))
    store.evict(0)

    assert there(store, keys) == [True] * 3 + [False]


def test_a_store_that_ends_at_that_moment_keeps_what_it_follows(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the rows any more nor in flight still: whoever looks at both in the wrong order misses it."""
    keys = old_chain(open_store, 4)
    store = open_store(index=None)
    hold = store._parts.inflight.hold(str(store.namespace), keys[3])
    keeper = store._keeper
    assert keeper is not None
    flush = keeper.flush

    def begin() -> None:
        hold.__enter__()
        monkeypatch.setattr(keeper, "flush", end)

    def end() -> None:
        flush()
        monkeypatch.setattr(keeper, "flush", flush)
        hold.__exit__(None, None, None)

    between_plan_and_removal(store, monkeypatch, begin)
    report = store.evict(0)

    assert there(store, keys) == [True] * 4
    assert report.kept == {"in_flight": 1, "has_children": 3}


@pytest.mark.parametrize("at_directory", [1, 20, 40, 60])
def test_an_index_that_is_cleared_in_a_scan_is_told_of_everything_again(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, at_directory: int
) -> None:
    """A repair clears the index that all processes of a host share; no chunk loses its parent by that."""
    monkeypatch.setattr("prefixstore.store.reconcile.PUT_ROWS", 1)
    monkeypatch.setattr("prefixstore.index.walk.WALK_ROWS", 4)
    writer = open_store(index=None)
    chains = [chain(str(number), 8) for number in range(10)]
    for keys in chains:
        store_chain(writer, keys)
    engine, tool = open_store(), open_store(namespace=None)
    engine.reconcile()
    directories = iter(range(10_000))

    def stop() -> bool:
        if next(directories) == at_directory:
            tool.hints.clear()
        return False

    engine._evictor.evict(
        lambda _used: 20 * FILE_BYTES, max_age_s=None, dry_run=False, scan=True, stop=stop
    )

    assert sum(sum(there(writer, keys)) for keys in chains) == 20
    assert orphans(writer, chains) == 0


def test_an_index_that_is_cleared_after_the_plan_ends_the_eviction(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody else fills it anew it has parents without their children."""
    keys = old_chain(open_store, 8)
    engine, tool = open_store(), open_store(namespace=None)

    def refill_half() -> None:
        rows = list(tool.hints.scan())
        tool.hints.clear()
        tool.hints.put_many(
            [(row.namespace, row.key, row.record) for row in rows if row.key in keys[:4]]
        )

    between_plan_and_removal(engine, monkeypatch, refill_half)
    report = engine.evict(0)

    assert there(engine, keys) == [True] * 8
    assert report.errors == (LOST,)
    assert engine.evict(0).evicted_chunks == 8


def test_no_plan_for_people_is_made_of_an_index_that_was_cleared(open_store: OpenStore) -> None:
    """Of half an index an export would be half an archive, and an erasure would take what is shared."""
    store_chain(open_store(index=None), chain("a", 10))
    tool, other = open_store(), open_store(namespace=None)
    for plan in (
        lambda: select(tool),
        lambda: plan_removal(tool, namespace=tool.namespace, keys=None),
        lambda: plan_chains(tool, {}),
    ):
        tool.reconcile()
        plan()
        other.hints.clear()
        with pytest.raises(UnavailableError, match="try again"):
            plan()


class Failing(MemoryIndex):
    """An index that fails with the twentieth chunk it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 20

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Learn, until it fails."""
        self._left -= 1
        if self._left < 0:
            raise UnavailableError("the index's disk is full")
        super().put_many(entries)


def test_an_index_that_fails_in_a_scan_for_people_is_made_up_for(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes its place is told of everything."""
    monkeypatch.setattr("prefixstore.store.reconcile.PUT_ROWS", 1)
    store_chain(open_store(index=None), chain("a", 40))
    store = open_store(index=Failing())
    report = store.reconcile()

    assert (report.finished, report.errors) == (True, [])
    assert len(select(store).chunks) == 40


def test_an_index_that_fails_again_and_again_is_told(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that could tell nobody is none, and nothing goes by it."""
    monkeypatch.setattr("prefixstore.store.reconcile.PUT_ROWS", 1)
    monkeypatch.setattr("prefixstore.store.hints.MemoryIndex", Failing)
    keys = chain("a", 40)
    store_chain(open_store(index=None), keys)
    store = open_store(index=Failing())
    report = store.evict(0)

    assert report.errors == (LOST,)
    assert there(store, keys) == [True] * 40
    assert not store.stats().complete
