"""Processes that are killed at any moment leave an index that is right."""

import os
import random
import signal
import time

import pytest

from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.records import Record
from prefixstore.testing.index_contract import ONE, chain, check_counts, entries

CHAINS = 24
LENGTH = 64
MAP_BYTES = 2**20
MAP_BYTES_MAX = 2**26
"""Live rows need some 2 MiB. Unless killed readers are cleared, they pin all the rest in seconds."""


def one_step(index, rng):
    """Do what a store would do, with overlapping chains in any order."""
    keys = chain(LENGTH, seed=rng.randrange(CHAINS))
    cut = rng.randrange(1, LENGTH)
    now_s = rng.randrange(1000)
    match rng.randrange(6):
        case 0:
            rows = entries(keys, used_s=now_s)
            rng.shuffle(rows)
            index.put_many(rows[:cut])
        case 1:
            index.put_many([(ONE, key, Record(used_s=now_s, presumed=True)) for key in keys[:cut]])
        case 2:
            index.remove_many(ONE, keys[cut:])
        case 3:
            index.touch_many(ONE, keys[:cut], used_s=now_s, refresh_s=100)
        case 4:
            index.set_pins({(ONE, key): 1 for key in keys[:cut:8]})
        case 5:
            assert 0 <= index.known_prefix(ONE, keys) <= LENGTH
            for row in index.oldest_first():
                assert row.refs.children <= LENGTH


def live(place, seed):
    """Use the index until killed, opening it again now and then."""
    rng = random.Random(seed)
    while True:
        with LmdbIndex.open(
            place, store_id="store", map_bytes=MAP_BYTES, map_bytes_max=MAP_BYTES_MAX
        ) as index:
            for _ in range(rng.randrange(200)):
                one_step(index, rng)


def storm(place, children, *, seconds, processes):
    """Keep ``processes`` alive and kill one every few milliseconds; return the number of kills."""
    rng = random.Random(7)
    kills = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        while len(children.alive) < processes:
            seed = rng.randrange(2**30)
            children.start(lambda seed=seed: live(place, seed))
        time.sleep(rng.random() * 0.03)
        victim = rng.choice(list(children.alive))
        os.kill(victim, signal.SIGKILL)
        assert children.wait(victim) == -signal.SIGKILL, children.failures()
        kills += 1
    children.kill_all()
    return kills


@pytest.mark.parametrize(
    ("seconds", "processes"),
    [pytest.param(3, 4, id="short"), pytest.param(30, 6, id="long", marks=pytest.mark.stress)],
)
def test_kill_storm(tmp_path, children, seconds, processes):
    """After a storm of SIGKILLs counts equal a recount, and no map ran full on dead readers."""
    kills = storm(tmp_path / "index", children, seconds=seconds, processes=processes)
    assert [] == children.failures()
    # A loaded machine kills fewer; a storm of fewer than this proves nothing.
    assert kills > seconds
    with LmdbIndex.open(tmp_path / "index", store_id="store") as index:
        check_counts(
            index, [(ONE, key) for seed in range(CHAINS) for key in chain(LENGTH, seed=seed)]
        )
        assert sum(1 for _ in index.scan()) > 0
