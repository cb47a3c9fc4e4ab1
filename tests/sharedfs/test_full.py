"""A filesystem that is really full: stores stop, eviction makes room, stores resume; loads never stop."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore, SkipReason
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, chunk_at, load, payload_of
from tests.sharedfs.hosts import until

SIZE_BYTES = 4 * 2**20
RESUME_S = 35.0
"""The longest pause of the breaker, and some."""


@pytest.fixture
def small(tmp_path: Path, glusterfs: None) -> Iterator[Path]:
    """Give a filesystem of its own that a few hundred chunks fill; may be made where volumes may."""
    path = tmp_path / "small"
    path.mkdir()
    options = f"size={SIZE_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_filesystem_is_evicted_from_and_stored_to_again(small: Path) -> None:
    """Nobody does anything: within the longest pause there is room, while loads go on all along."""
    # The quota says that there is room: others, or a wrong quota, have filled the filesystem.
    config = StoreConfig(max_bytes=2**30)
    root = str(small / "root")
    with PrefixStore.open(root, namespace=FIELDS, config=config, index=None) as store:
        keys = [chain(f"full/{number}", 1)[0] for number in range(2 * SIZE_BYTES // FILE_BYTES)]
        hot, cold = keys[:8], keys[8:]
        for key in hot:
            assert store.store(chunk_at([key], 0), payload_of(key)).published
        store.pin("hot", hot)
        done, wrong = threading.Event(), []

        def load_all_along() -> None:
            while not done.is_set():
                wrong.extend(key for key in hot if load(store, key) != payload_of(key))

        loading = threading.Thread(target=load_all_along)
        loading.start()
        try:
            outcomes = [store.store(chunk_at([key], 0), payload_of(key)) for key in cold]
            reasons = {outcome.reason for outcome in outcomes}
            assert SkipReason.FULL in reasons
            assert reasons <= {None, SkipReason.FULL, SkipReason.PAUSED}
            late = chain("late", 1)
            until(
                lambda: store.store(chunk_at(late, 0), payload_of(late[0])).published,
                within_s=RESUME_S,
            )
        finally:
            done.set()
            loading.join()
        assert wrong == []
        assert store.counters()["evicted"] > 0


def test_what_others_fill_is_not_answered_by_evicting_all(small: Path) -> None:
    """Each refusal costs a seventh; with the disk full of others' files loads still go on."""
    config = StoreConfig(max_bytes=2**30)
    root = str(small / "root")
    with PrefixStore.open(
        root, namespace=FIELDS, config=config, index=None, background=False
    ) as store:
        keys = [chain(f"mine/{number}", 1)[0] for number in range(100)]
        for key in keys:
            assert store.store(chunk_at([key], 0), payload_of(key)).published
        store.work()
        with (small / "theirs").open("wb", buffering=0) as theirs, contextlib.suppress(OSError):
            while True:
                theirs.write(bytes(2**16))
        new = chain("new", 1)
        assert store.store(chunk_at(new, 0), payload_of(new[0])).reason is SkipReason.FULL
        store.work()
        left = sum(load(store, key) == payload_of(key) for key in keys)
        assert left == 85
