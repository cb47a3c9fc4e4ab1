"""A damaged file costs the index, never the process that opens it."""

import random

import pytest

from prefixstore.index.lmdb_index import LmdbIndex
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
    (path,) = (tmp_path / "index").glob("store/*/slot-0/lmdb*/data.mdb")
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
    "trials", [pytest.param(4, id="few"), pytest.param(100, id="many", marks=pytest.mark.stress)]
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
