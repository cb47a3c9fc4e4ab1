"""Writers, readers, collectors and reapers at once: every load gives the key's own bytes, or a miss."""

import random
import threading
import time
from pathlib import Path

import pytest

from prefixstore.blob.reasons import MissReason
from prefixstore.config import Codec
from prefixstore.errors import UnavailableError
from prefixstore.tree.pins import Pin, Pins
from prefixstore.tree.quarantine import Quarantine
from tests.tree.trees import Fixture, in_children, key_of, payload_of

KEYS = [key_of(str(number)) for number in range(40)]
CODECS = list(Codec)


def test_two_writers_of_one_key_leave_one_blob(quick_path):
    """Each is told the truth: one stored it, the other found it."""
    path = str(quick_path / "root")
    Fixture(path)
    told = quick_path / "told"
    told.mkdir()

    def race(number: int) -> None:
        here = Fixture(path)
        while not (quick_path / "go").exists():
            time.sleep(0.0001)
        existed = [here.store(key, codec=CODECS[number % 3]).existed for key in KEYS]
        (told / str(number)).write_text("".join("01"[flag] for flag in existed))

    starter = threading.Timer(0.2, (quick_path / "go").touch)
    starter.start()
    assert in_children(4, race) == [0] * 4
    starter.join()

    answers = [file.read_text() for file in told.iterdir()]
    # Exactly one of the four stored each key.
    assert [sum(answer[at] == "0" for answer in answers) for at in range(len(KEYS))] == [1] * 40
    here = Fixture(path)
    assert all(here.load(key) == payload_of(key) for key in KEYS)
    assert here.temporaries() == []


@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once_brings_no_wrong_byte(quick_path, seed):
    """Store, load, evict, tear, quarantine, reap and scan from six processes over one root."""
    path = str(quick_path / "root")
    Fixture(path)

    def work(number: int) -> None:
        source = random.Random(f"{seed}/{number}")
        here = Fixture(path)
        here.writers.register(here.tree.writer)
        deadline_s = time.monotonic() + 1.5
        while time.monotonic() < deadline_s:
            do_something(here, source)
        here.writers.leave(here.tree.writer)

    assert in_children(6, work) == [0] * 6

    here = Fixture(path)
    for key in KEYS:
        store(here, key, Codec.RAW)
        assert here.load(key) == payload_of(key)
    assert here.temporaries() == []


def do_something(here: Fixture, source: random.Random) -> None:
    key = source.choice(KEYS)
    match source.randrange(20):
        case 0:
            here.tree.unlink(here.namespace, key)
        case 1:
            tear(here.file_of(key), source)
        case 2:
            Quarantine(here.root, bytes_max=200_000).take(here.namespace, key, MissReason.TORN)
        case 3:
            here.writers.reap(server_now_s=time.time(), spare=here.tree.writer)
        case 4:
            for _, leaf in here.tree.scan(here.namespace):
                assert {entry.key for entry in leaf} <= set(KEYS)
        case 5 | 6 | 7 | 8 | 9:
            store(here, key, source.choice(CODECS))
        case _:
            found = here.load(key)
            assert isinstance(found, str) or found == payload_of(key), key.hex()


def tear(path: Path, source: random.Random) -> None:
    """Leave a file of another length under a blob's name, as a power cut does; never one being read.

    Blobs are immutable for everybody who follows the format, so the torn file is a new one.
    """
    torn = path.with_name(f"torn.{source.random()}")
    try:
        torn.write_bytes(path.read_bytes()[: source.randrange(20_000)])
        torn.rename(path)
    except FileNotFoundError:
        return


def store(here: Fixture, key: bytes, codec: Codec) -> None:
    """Store, where others may evict and tear as fast as this stores."""
    try:
        here.store(key, codec=codec)
    except UnavailableError as error:
        assert "vanished" in str(error), error  # noqa: PT017 - anything else is a failure


def test_threads_share_a_tree(here):
    """One writer's threads never meet in a temporary file, a scratch buffer or a context."""
    wrong: list[bytes] = []

    def work(number: int) -> None:
        for key in KEYS[number::2] + KEYS[:10]:
            here.store(key, codec=CODECS[number % 3])
            if here.load(key) != payload_of(key):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert here.temporaries() == []


def test_a_forked_child_does_not_collide_with_its_parent(here):
    """A child inherits writer and counter; both go on storing."""
    here.store(KEYS[0])

    def work(number: int) -> None:
        for key in KEYS[number * 10 : number * 10 + 10]:
            here.store(key)

    assert in_children(4, work) == [0] * 4
    assert all(here.load(key) == payload_of(key) for key in KEYS)


def test_a_pin_is_whole_while_it_is_replaced(quick_path):
    """Readers see the old keys or the new ones, never none and never a mixture."""
    path = str(quick_path / "root")
    here = Fixture(path)
    versions = [tuple(KEYS[:number]) for number in (1, 20, 40)]
    Pins(here.root).write(pin_of(here, versions[0]))

    def work(number: int) -> None:
        mine = Fixture(path)
        pins = Pins(mine.root)
        for turn in range(100):
            if number < 2:
                pins.write(pin_of(mine, versions[turn % 3]))
            else:
                assert [pin.keys in versions for pin in pins] == [True]

    assert in_children(4, work) == [0] * 4


def pin_of(here: Fixture, keys: tuple) -> Pin:
    return Pin(name="system", namespace=here.namespace, keys=keys, created_s=1)
