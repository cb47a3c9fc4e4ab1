"""Plans of removal: what follows goes with what is named, what pins need stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.ops.removal import carry_out, find_namespace, plan_removal
from prefixstore.ops.report import report
from prefixstore.store import Chunk, PrefixStore
from prefixstore.testing.chains import FIELDS, chain, payload_of, store_chain

TRUNK, LEFT, RIGHT = chain("trunk", 3), chain("left", 3), chain("right", 3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    """Return a store with a fork: a trunk of three chunks and two branches of three."""
    path = str(tmp_path / "root")
    config = StoreConfig(direct_io="off")
    with PrefixStore.open(
        path, namespace=FIELDS, config=config, index=None, background=False
    ) as opened:
        store_chain(opened, TRUNK)
        for branch in (LEFT, RIGHT):
            for at, key in enumerate(branch):
                parent = branch[at - 1] if at else TRUNK[-1]
                chunk = Chunk(key=key, parent=parent, end_token=16 * (4 + at))
                opened.store(chunk, payload_of(key))
        opened.reconcile()
        yield opened


def keys_of(store: PrefixStore) -> set[bytes]:
    """Return the keys whose blobs are in the tree."""
    return {bytes.fromhex(path.stem) for path in Path(store.root.path).rglob("ns/**/*.kv")}


def test_a_branch_goes_without_the_other(store: PrefixStore) -> None:
    """Removing the start of a branch removes the branch, deepest first."""
    plan = plan_removal(store, namespace=None, keys=[LEFT[0]])

    assert [key for _, key in plan.chunks] == list(reversed(LEFT))
    carry_out(store, plan)
    assert keys_of(store) == {*TRUNK, *RIGHT}


def test_a_pin_keeps_its_chunk_and_all_before_it(store: PrefixStore) -> None:
    """Removing the trunk leaves what a pinned chunk of a branch needs."""
    store.pin("left", [LEFT[1]])
    plan = plan_removal(store, namespace=None, keys=[TRUNK[0]])
    carry_out(store, plan)

    assert plan.pinned_chunks == 5
    assert keys_of(store) == {*TRUNK, LEFT[0], LEFT[1]}


def test_unknown_keys_are_named(store: PrefixStore) -> None:
    """A key that is nowhere is told, and the rest goes."""
    unknown = chain("nowhere", 1)[0]
    plan = plan_removal(store, namespace=None, keys=[unknown, RIGHT[2]])

    assert plan.unknown_keys == (unknown,)
    assert [key for _, key in plan.chunks] == [RIGHT[2]]


def test_a_pinned_key_is_not_called_unknown(store: PrefixStore) -> None:
    """It is there, and stays."""
    store.pin("leaf", [RIGHT[2]])
    plan = plan_removal(store, namespace=None, keys=[RIGHT[2]])

    assert (plan.chunks, plan.unknown_keys, plan.pinned_chunks) == ((), (), 3 - 2)


def test_a_namespace_is_emptied_down_to_its_manifest(store: PrefixStore) -> None:
    """Directories of blobs go when no chunk stays; the manifest stays for engines that have it open."""
    namespace = store.namespace
    assert namespace is not None
    store.pin("trunk", TRUNK[:1])
    carry_out(store, plan_removal(store, namespace=namespace, keys=None))
    assert keys_of(store) == {TRUNK[0]}

    store.unpin("trunk")
    carry_out(store, plan_removal(store, namespace=namespace, keys=None))
    assert [path.name for path in Path(store.root.layout.namespace(namespace)).iterdir()] == [
        "manifest.json"
    ]


def test_a_removed_namespace_can_be_stored_into_again(store: PrefixStore) -> None:
    """An engine that has it open goes on as if nothing had been."""
    carry_out(store, plan_removal(store, namespace=store.namespace, keys=None))
    outcomes = store_chain(store, TRUNK)

    assert all(outcome.published for outcome in outcomes)
    assert keys_of(store) == set(TRUNK)


def test_removing_everything_is_not_offered(store: PrefixStore) -> None:
    """Neither a namespace nor keys is a mistake."""
    with pytest.raises(InvalidError, match="not offered"):
        plan_removal(store, namespace=None, keys=None)


def test_namespaces_are_found_by_their_beginning(store: PrefixStore) -> None:
    """One match is needed; none and several are told with what there is."""
    namespace = store.namespace
    assert namespace is not None
    assert find_namespace(store.root, namespace[:5].upper()) == namespace
    with pytest.raises(InvalidError, match=namespace):
        find_namespace(store.root, "xyz")
    for number in range(20):
        store.root.namespace({"n": number}, create=True)
    with pytest.raises(InvalidError, match="namespaces begin"):
        find_namespace(store.root, "")


def test_a_report_adds_up(store: PrefixStore) -> None:
    """The root's sums are those of its namespaces, and pins are named."""
    store.pin("trunk", TRUNK)
    found = report(store)

    assert found.chunks == sum(line.chunks for line in found.namespaces) == 9
    assert found.file_bytes == sum(line.file_bytes for line in found.namespaces)
    assert found.pins == {"trunk": 3}
    assert found.namespaces[0].fields == FIELDS
    assert found.errors == ()
