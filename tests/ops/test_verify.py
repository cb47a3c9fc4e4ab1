"""Scrubs: paced, sampled, and honest about what they could not read."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.ops.verify import verify
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.tree.osfs import RealOs
from prefixstore.tree.quarantine import Quarantine


@pytest.fixture
def disk() -> FaultyOs:
    """Return a filesystem that can be made to fail."""
    return FaultyOs(RealOs())


@pytest.fixture
def store(tmp_path: Path, disk: FaultyOs) -> Iterator[PrefixStore]:
    """Return a store with a chain of twenty chunks."""
    config = StoreConfig(direct_io="off")
    path = str(tmp_path / "root")
    with PrefixStore.open(
        path, namespace=FIELDS, config=config, index=None, os_calls=disk, background=False
    ) as opened:
        store_chain(opened, chain("a", 20))
        yield opened


def test_a_rate_is_kept(store: PrefixStore) -> None:
    """Twenty blobs at one a second take twenty seconds, by the clock given."""
    clock = ManualClock()
    start_s = clock.monotonic_s()
    report = verify(store, rate_bytes_s=FILE_BYTES, clock=clock)

    assert report.is_clean
    assert clock.monotonic_s() - start_s == pytest.approx(20)


def test_progress_is_told(store: PrefixStore) -> None:
    """After each blob, with the sums so far."""
    seen: list[tuple[int, int]] = []
    verify(store, progress=lambda chunks, size_bytes: seen.append((chunks, size_bytes)))

    assert seen == [(n, n * FILE_BYTES) for n in range(1, 21)]


def test_lots_differ_by_seed_and_share_nothing_by_accident(store: PrefixStore) -> None:
    """Many small lots together check nearly all blobs."""
    checked = [verify(store, sample=0.3, seed=seed).checked_chunks for seed in range(20)]

    assert 60 < sum(checked) < 200
    assert len(set(checked)) > 1


def test_what_cannot_be_read_is_no_finding(store: PrefixStore, disk: FaultyOs) -> None:
    """An I/O error is told as an error: nothing was proved about the blob."""
    disk.plan = When(fault=Fail(errno.EIO), name="read_into", nth=disk.count("read_into") + 5)
    report = verify(store)

    assert not report.is_clean
    assert report.reasons == {}
    assert "EIO" in report.errors[0]


def test_a_root_that_is_gone_is_no_clean_root(store: PrefixStore, disk: FaultyOs) -> None:
    """Nothing checked is not the same as nothing wrong."""
    disk.plan = When(fault=Fail(errno.ENOTCONN), forever=True)

    assert not verify(store).is_clean


def test_blobs_that_vanish_meanwhile_are_no_findings(store: PrefixStore) -> None:
    """An engine may evict during a scrub."""
    keys = chain("a", 20)

    def evict_the_rest(chunks: int, _size_bytes: int) -> None:
        if chunks == 3:
            store.remove(list(reversed(keys)))

    assert verify(store, progress=evict_the_rest).is_clean


def test_a_blob_that_is_stored_anew_meanwhile_is_no_finding(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was damaged when it was read, and is sound when it is to be moved, stays and counts as sound."""
    path = Path(store.root.layout.blob(str(store.namespace), chain("a", 20)[3]))
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    take = Quarantine.take

    def overtaken(*arguments: object) -> bool:
        path.write_bytes(sound)
        return take(*arguments)

    monkeypatch.setattr(Quarantine, "take", overtaken)
    report = verify(store, quarantine=True)

    assert report.is_clean
    assert path.read_bytes() == sound


def test_wrong_arguments_are_refused(store: PrefixStore, tmp_path: Path) -> None:
    """A share of nothing, or quarantine through a read-only store."""
    with pytest.raises(InvalidError, match="share"):
        verify(store, sample=0)
    config = StoreConfig(read_only=True, direct_io="off")
    with (
        PrefixStore.open(str(tmp_path / "root"), config=config, index=None) as readonly,
        pytest.raises(InvalidError, match="read-only"),
    ):
        verify(readonly, quarantine=True)
