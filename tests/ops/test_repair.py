"""Repair: an index that agrees with the tree, nothing left of crashes, and nothing taken that is of use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId, namespace_id
from prefixstore.ops.repair import RepairPlan, carry_out, plan_repair
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, chunk_at, payload_of, store_chain

CHAINED = {**FIELDS, "groups": [{"kind": "FullAttentionSpec"}]}
WINDOWED = {**FIELDS, "groups": [{"kind": "FullAttentionSpec"}, {"kind": "SlidingWindowSpec"}]}
KEYS = chain("a", 10)
Open = Callable[..., PrefixStore]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    def open_it(fields: dict[str, object] | None = None, **settings: object) -> PrefixStore:
        config = StoreConfig.from_mapping(
            {"direct_io": "off", "index_dir": str(tmp_path / "index"), **settings}
        )
        return PrefixStore.open(
            str(tmp_path / "root"), namespace=fields, config=config, background=False
        )

    return open_it


def file_of(store: PrefixStore, namespace: NamespaceId, key: Key) -> Path:
    return Path(store.root.layout.blob(namespace, key))


def lose(store: PrefixStore, fields: dict[str, object], at: int, *, settled: bool = True) -> None:
    """Remove a chunk of the chain behind the store's back; let the others be old, or not."""
    namespace = namespace_id(fields)
    file_of(store, namespace, KEYS[at]).unlink()
    for path in Path(store.root.path).rglob("*.kv"):
        if settled:
            os.utime(path, (1, 1))


def planned(plan: RepairPlan) -> set[Key]:
    return {key for removal in plan.removals for _, key in removal.chunks}


def test_the_index_is_built_anew(opened: Open) -> None:
    """What it made up goes, what it missed comes, and pins hold again."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        store.pin("prompt", KEYS[:3])
    with opened() as store:
        namespace = namespace_id(CHAINED)
        store.hints.remove_many(namespace, KEYS[:5])
        plan = plan_repair(store)
        rows = {row.key: row for row in store.hints.scan(namespace)}

    assert (plan.chunks, plan.file_bytes, plan.errors) == (10, 10 * FILE_BYTES, ())
    assert set(rows) == set(KEYS)
    assert [rows[key].refs.pins for key in KEYS] == [1] * 3 + [0] * 7


def test_chunks_that_follow_nothing_go(opened: Open) -> None:
    """All that came after the lost chunk, and nothing before it."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        lose(store, CHAINED, 4)
    with opened() as store:
        plan = plan_repair(store)
        assert planned(plan) == set(KEYS[5:])
        report = carry_out(store, plan)
        left = {path.stem for path in Path(store.root.path).rglob("*.kv")}

    assert (report.dropped_chunks, report.dropped_bytes, report.errors) == (5, 5 * FILE_BYTES, ())
    assert left == {key.hex() for key in KEYS[:4]}


@pytest.mark.parametrize("fields", [WINDOWED, FIELDS])
def test_windows_and_what_may_be_one_stay(opened: Open, fields: dict[str, object]) -> None:
    """A manifest that does not say that all is of full attention keeps every chunk."""
    with opened(fields) as store:
        store_chain(store, KEYS)
        lose(store, fields, 4)
    with opened() as store:
        plan = plan_repair(store)

    assert (planned(plan), plan.kept_chunks) == (set(), 1)


def test_young_chunks_and_pinned_ones_stay(opened: Open) -> None:
    """A writer may bring the parent any moment; a pin is a promise."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        lose(store, CHAINED, 4, settled=False)
        assert planned(plan_repair(store)) == set()
        lose(store, CHAINED, 3)
        store.pin("prompt", KEYS[:8])
        plan = plan_repair(store)

    assert planned(plan) == {*KEYS[8:]}
    assert plan.kept_chunks == 3


def test_a_parent_that_came_back_saves_its_children(opened: Open) -> None:
    """Between the plan and its execution an engine may store it."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        lose(store, CHAINED, 4)
        plan = plan_repair(store)
        store.store(chunk_at(KEYS, 4), payload_of(KEYS[4]))
        report = carry_out(store, plan)

    assert report.dropped_chunks == 0


def test_nothing_is_dropped_where_not_all_can_be_read(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be listed hides parents."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        lose(store, CHAINED, 4)
        leaf = file_of(store, namespace_id(CHAINED), KEYS[2]).parent
        scan = type(store.root.os_calls).scan

        def failing(calls: object, path: str) -> object:
            if path == str(leaf):
                raise OSError(5, "Input/output error")
            return scan(calls, path)

        monkeypatch.setattr(type(store.root.os_calls), "scan", failing)
        plan = plan_repair(store)

    assert planned(plan) == set()
    assert plan.errors


def test_where_orphans_could_not_be_looked_for_is_told(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reaping passes over what it cannot read; who repairs a root hears of it."""
    with opened(CHAINED) as store:
        scan = type(store.root.os_calls).scan

        def failing(calls: object, path: str) -> object:
            if path.endswith("/history"):
                raise OSError(5, "Input/output error")
            return scan(calls, path)

        monkeypatch.setattr(type(store.root.os_calls), "scan", failing)
        plan = plan_repair(store)
        (error,) = plan.errors
        report = carry_out(store, plan)

    assert "/history" in error
    assert report.errors == (error,)


def test_torn_files_and_orphans_go(opened: Open, tmp_path: Path) -> None:
    """A short file under a blob's name is kept for people, a dead writer's files for nobody."""
    with opened(CHAINED) as store:
        store_chain(store, KEYS)
        torn = file_of(store, namespace_id(CHAINED), KEYS[9])
        torn.write_bytes(b"x" * 5000)
        orphan = torn.with_name(f".{'ab' * 16}.1.tmp")
        orphan.write_bytes(b"x")
        os.utime(torn, (1, 1))
        os.utime(orphan, (1, 1))
    with opened(read_only=True) as store:
        dry = plan_repair(store)
        assert (len(dry.torn), dry.orphan_files, dry.dead_writers) == (1, 1, ("ab" * 16,))
        assert orphan.exists()
        with pytest.raises(InvalidError, match="read-only"):
            store.reap()
    with opened() as store:
        report = carry_out(store, plan_repair(store))

    assert (report.torn_files, report.orphan_files, report.dead_writers) == (1, 1, 1)
    assert not torn.exists()
    assert not orphan.exists()
    assert len(list(tmp_path.glob("root/quarantine/torn.*"))) == 1
