"""A damaged file costs the index, never the process that opens it."""

import os
import random
import signal
import sys
import time

import pytest

from prefixstore.errors import UnavailableError
from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.probe import Verdict, probe
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.index_contract import ONE, chain, check_counts, entries

PAGE = 4096
CHAINS = [chain(300, seed=seed) for seed in range(10)]


def flip(image, rng):
    """Flip 16 bits anywhere."""
    for _ in range(16):
        image[rng.randrange(len(image))] ^= 1 << rng.randrange(8)


def zero(image, rng):
    """Zero one page, a meta page perhaps."""
    at = rng.randrange(len(image) // PAGE) * PAGE
    image[at : at + PAGE] = bytes(PAGE)


def truncate(image, rng):
    """Lose the end."""
    del image[rng.randrange(len(image)) :]


def overwrite(image, rng):
    """Fill one page with noise."""
    at = rng.randrange(len(image) // PAGE) * PAGE
    image[at : at + PAGE] = rng.randbytes(PAGE)


def misplace(image, rng):
    """Write one page where another belongs."""
    pages = len(image) // PAGE
    source, target = rng.randrange(pages) * PAGE, rng.randrange(pages) * PAGE
    image[target : target + PAGE] = image[source : source + PAGE]


DAMAGES = [flip, zero, truncate, overwrite, misplace]


@pytest.fixture
def written(tmp_path):
    """An index with 3000 rows that was closed in order, and its data file."""
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        for at, keys in enumerate(CHAINS):
            index.put_many(entries(keys, used_s=at))
        # Pages on the free list are pages, too.
        index.remove_many(ONE, CHAINS[3])
        index.set_pins({(ONE, CHAINS[0][0]): 1})
    return data_file(tmp_path)


def data_file(tmp_path):
    (path,) = (tmp_path / "index").glob("store/*/seat-0/lmdb*/data.mdb")
    return path


def use(tmp_path):
    """Open, check what is there, and go on as a store would; runs in a child."""
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        check_counts(index)
        rows = sum(1 for _ in index.scan())
        assert rows in (0, 2700), rows
        for at, keys in enumerate(CHAINS):
            index.put_many(entries(keys, used_s=100 + at))
        check_counts(index)
        assert sum(1 for _ in index.scan()) == 3000


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "trials", [pytest.param(3, id="few"), pytest.param(100, id="many", marks=pytest.mark.stress)]
)
def test_damage_never_kills(tmp_path, written, children, damage, trials):
    """Whatever happened to the file, the index opens, is right and can be written."""
    whole = written.read_bytes()
    for seed in range(trials):
        image = bytearray(whole)
        damage(image, random.Random(seed))
        written.write_bytes(image)
        code = children.run(lambda: use(tmp_path))
        assert code == 0, (damage.__name__, seed, children.failures())
        written = data_file(tmp_path)


def test_a_whole_file_is_kept(tmp_path, written, children):
    """The probe does not cry wolf: after a kill the index comes back with all of its rows."""

    def use_and_die():
        LmdbIndex.open(tmp_path / "index", store_id="store").put_many(entries(CHAINS[3], used_s=9))
        os.kill(os.getpid(), signal.SIGKILL)

    assert children.run(use_and_die) == -signal.SIGKILL
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        assert sum(1 for _ in index.scan()) == 3000
        check_counts(index)


@pytest.mark.parametrize("size", [0, 1, 100, 8192, 200_000])
def test_a_broken_lock_file(tmp_path, written, children, size):
    """The lock file of an environment that nobody uses may hold anything."""
    (written.parent / "lock.mdb").write_bytes(random.Random(size).randbytes(size))
    assert children.run(lambda: use(tmp_path)) == 0, children.failures()


def test_a_file_of_something_else(tmp_path, written, children):
    """A file that LMDB refuses is replaced."""
    written.write_bytes(b"not a database" * 1000)
    assert children.run(lambda: use(tmp_path)) == 0, children.failures()


def test_damage_met_in_use(tmp_path, written, children):
    """A value that fails its check ends the use of the index, and the next opening starts anew."""
    image = bytearray(written.read_bytes())

    def meet():
        with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
            index.known_prefix(ONE, CHAINS[5])
            # LMDB maps this file, so what is written to it is what is read next.
            at = image.index(CHAINS[5][7] + b"\x01\x00") + len(CHAINS[5][7])
            with written.open("r+b") as file:
                file.seek(at + 8)
                file.write(b"\xff")
            for _ in range(2):
                with pytest.raises(UnavailableError, match="damaged"):
                    index.get_many(ONE, CHAINS[5])
            with pytest.raises(UnavailableError, match="damaged"):
                index.put_many(entries(CHAINS[1], used_s=1))
        with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
            assert index.totals() == {}

    assert children.run(meet) == 0, children.failures()


def test_damage_beside_a_user(tmp_path, written, children):
    """One process discards; another that has the old file open learns of it within a minute."""
    clock = ManualClock()
    with LmdbIndex.open(tmp_path / "index", store_id="store", clock=clock) as index:
        assert sum(1 for _ in index.scan()) == 2700
        assert children.run(lambda: discard(tmp_path)) == 0, children.failures()
        clock.advance(61)
        with pytest.raises(UnavailableError, match="discarded by another process"):
            index.totals()
        with LmdbIndex.open(tmp_path / "index", store_id="store", clock=clock) as again:
            assert again.totals()[ONE].chunks == 300


def discard(tmp_path):
    """Start the index anew; runs in a child."""
    with LmdbIndex.open(tmp_path / "index", store_id="store", discard=True) as index:
        assert index.totals() == {}
        index.put_many(entries(CHAINS[0], used_s=1))


def test_a_clean_close_needs_no_probe(tmp_path, written, monkeypatch):
    """A file that is as the last close left it is opened without a child process."""
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        assert sum(1 for _ in index.scan()) == 2700


def test_no_child_no_trust(tmp_path, written, monkeypatch):
    """Where a file cannot be probed, it is not opened either."""
    time.sleep(0.02)  # past the granularity of file times
    os.utime(written)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        assert index.totals() == {}


def test_the_probe_has_a_deadline(tmp_path, written):
    """What there was no time for stays unproven, and the verdict is about the rest."""
    assert Verdict.FIT is probe(written.parent, within_s=0)


def test_a_hanging_probe_condemns(tmp_path):
    """A file that cannot even be opened in time is damaged."""
    os.mkfifo(tmp_path / "data.mdb")
    assert Verdict.DAMAGED is probe(tmp_path, within_s=0, hang_s=0.5)
