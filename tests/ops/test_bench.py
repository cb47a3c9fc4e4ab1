"""Measuring a root: through the real store, with real files, and nothing is left."""

from pathlib import Path

import pytest

from prefixstore.errors import FullError
from prefixstore.ops.bench import bench
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, store_chain
from prefixstore.tree.root import Root


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return a root that holds chunks already."""
    path = f"{tmp_path}/root"
    with PrefixStore.open(path, namespace=FIELDS, index=None, background=False) as store:
        store_chain(store, chain("a", 3))
    return path


def names(root: str) -> set[str]:
    """Return every path in the root."""
    return {str(path) for path in Path(root).rglob("*")}


def test_every_chunk_is_stored_and_loaded_and_nothing_stays(root: str) -> None:
    """Each operation is counted, and the root is as it was."""
    before = names(root)
    found = bench(Root.open(root), chunk_bytes=5000, chunks=20, threads=3)

    assert [(timing.operation, timing.count) for timing in found.timings] == [
        ("store", 20),
        ("load, cold", 20),
        ("load again", 20),
        ("look up the chain", 20),
    ]
    assert [timing.bytes_per_s > 0 for timing in found.timings] == [True, True, True, False]
    assert all(0 < timing.median_s <= timing.p99_s for timing in found.timings)
    assert names(root) == before


def test_a_disk_without_room_is_not_filled(root: str) -> None:
    """What is wanted and what is free are named before anything is written."""
    before = names(root)
    with pytest.raises(FullError, match="bytes free"):
        bench(Root.open(root), chunk_bytes=2**40, chunks=1000, threads=1)

    assert names(root) == before
