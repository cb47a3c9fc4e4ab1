"""Processes that are killed at any moment, on one root and one index: no wrong byte, nothing lost.

Workers store, load, touch, pin and evict until SIGKILL meets them; others take their place. Each worker
writes down what it was told is published, before it goes on. At the end everything that was published
and that no eviction can have taken loads byte by byte, and the index counts what the tree holds.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import (
    FIELDS,
    FILE_BYTES,
    chain,
    chunk_at,
    load,
    payload_of,
)
from prefixstore.testing.model import recount

WORKERS = 4
CHAINS = 24
LENGTH = 8
KEPT = [chain(f"kept {number}", LENGTH) for number in range(6)]
"""Pinned before the storm: no eviction may take them."""
FREE = [chain(f"free {number}", LENGTH) for number in range(CHAINS)]


class Storm:
    """Workers on one root, killed and replaced for a while."""

    def __init__(self, base: Path, *, codec: str) -> None:
        self.base = base
        self.codec = codec
        self.kills = 0
        self.reports = base / "reports"
        self.reports.mkdir()

    def open(self, index: str = "index") -> PrefixStore:
        """Open the root with the host's index and background threads, as an engine does."""
        config = StoreConfig(
            index_dir=str(self.base / index),
            direct_io="off",
            codec=self.codec,
            max_bytes=(CHAINS // 2 + len(KEPT)) * LENGTH * FILE_BYTES,
            touch_interval_s=0,
            miss_ttl_s=0.05,
        )
        return PrefixStore.open(str(self.base / "root"), namespace=FIELDS, config=config)

    def run(self, duration_s: float, *, seed: int) -> None:
        """Keep workers running and kill one every few hundredths of a second."""
        dice = random.Random(seed)
        alive: dict[int, int] = {}
        until_s = time.monotonic() + duration_s
        number = 0
        while time.monotonic() < until_s:
            while len(alive) < WORKERS:
                number += 1
                alive[self._start(dice.randrange(2**32), number)] = number
            time.sleep(dice.uniform(0.02, 0.3))
            victim = dice.choice(list(alive))
            os.kill(victim, signal.SIGKILL)
            self._reap(victim, alive)
            self.kills += 1
        for victim in list(alive):
            os.kill(victim, signal.SIGKILL)
            self._reap(victim, alive)

    def published(self) -> set[Key]:
        """Return every key that some worker was told is published."""
        lines = [path.read_text() for path in self.reports.glob("published-*")]
        return {Key(bytes.fromhex(line)) for text in lines for line in text.split()}

    def complaints(self) -> list[str]:
        """Return what workers found wrong."""
        return [path.read_text() for path in self.reports.glob("wrong-*")]

    def _start(self, seed: int, number: int) -> int:
        child = os.fork()
        if child:
            return child
        try:
            self._work(random.Random(seed), number)
        except BaseException as error:  # noqa: BLE001 - the parent reads of it
            (self.reports / f"wrong-{number}").write_text(repr(error))
        finally:
            os._exit(1)

    def _reap(self, victim: int, alive: dict[int, int]) -> None:
        _, status = os.waitpid(victim, 0)
        number = alive.pop(victim)
        assert os.WIFSIGNALED(status), (number, self.complaints())
        assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)

    def _work(self, dice: random.Random, number: int) -> None:
        with self.open() as store, (self.reports / f"published-{number}").open("w") as notes:
            while True:
                keys = dice.choice(KEPT + FREE)
                match dice.randrange(10):
                    case 0 | 1 | 2:
                        self._store_prefix(store, keys[: dice.randint(1, LENGTH)], notes)
                    case 3 | 4 | 5:
                        self._load(store, dice.choice(keys), number)
                    case 6:
                        store.longest_prefix(keys)
                    case 7:
                        store.touch(keys)
                    case 8:
                        store.contains(keys)
                    case _ if dice.random() < 0.1:
                        store.evict((CHAINS // 3 + len(KEPT)) * LENGTH * FILE_BYTES)

    def _store_prefix(self, store: PrefixStore, keys: list[Key], notes: object) -> None:
        for at, key in enumerate(keys):
            if store.store(chunk_at(keys, at), payload_of(key)).published:
                notes.write(f"{key.hex()}\n")  # type: ignore[attr-defined]
                notes.flush()  # type: ignore[attr-defined]

    def _load(self, store: PrefixStore, key: Key, number: int) -> None:
        found = load(store, key)
        if found not in (payload_of(key), "absent"):
            (self.reports / f"wrong-{number}").write_text(f"{key.hex()}: {found!r:.80}")


def weather(base: Path, *, duration_s: float, seed: int, codec: str = "raw") -> Storm:
    """Run a storm and look at what is left."""
    storm = Storm(base, codec=codec)
    with storm.open() as store:
        for number, keys in enumerate(KEPT):
            store.pin(f"kept-{number}", keys)
    storm.run(duration_s, seed=seed)
    assert storm.complaints() == [], f"seed {seed}"
    published = storm.published()
    with storm.open() as store:
        assert store.stats().index_kind == "LmdbIndex", "the index survived every kill"
        store.reconcile()
        sizes, children = recount(store)
        rows = {row.key: row for row in store.hints.scan(store.namespace)}
        assert set(rows) == set(sizes)
        assert {key: row.refs.children for key, row in rows.items()} == {
            key: children[key] for key in sizes
        }
        kept = {key for keys in KEPT for key in keys}
        assert published & kept <= set(sizes), "what is pinned and published is there"
        for key in sizes:
            assert load(store, key) == payload_of(key)
        for key in published - set(sizes):
            assert load(store, key) == "absent"
    return storm


def test_five_seconds_of_kills(quick_path: Path) -> None:
    """A short storm with every run of the tests."""
    storm = weather(quick_path, duration_s=5, seed=random.randrange(2**32))

    assert storm.kills >= 10
    assert len(storm.published()) > LENGTH


@pytest.mark.stress
@pytest.mark.parametrize("codec", ["raw", "auto", "shuffle+zstd"])
def test_half_a_minute_of_kills(quick_path: Path, codec: str) -> None:
    """A long storm, for each way to store."""
    storm = weather(quick_path, duration_s=30, seed=random.randrange(2**32), codec=codec)

    # A loaded machine kills fewer; a storm of fewer than this proves nothing.
    assert storm.kills >= 25
