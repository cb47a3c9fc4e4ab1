"""What strays into a root, or is planted there, is never followed, counted, read or removed."""

import os
from pathlib import Path

import pytest

from prefixstore.blob.reasons import MissReason
from prefixstore.errors import InvalidError
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.paths import blob_key, is_fan, is_namespace, is_writer
from prefixstore.tree.pins import Pins
from prefixstore.tree.quarantine import Quarantine
from prefixstore.tree.root import Root
from tests.tree.trees import Fixture, key_of, payload_of

KEY = key_of("one")
HOSTILE_NAMES = [
    "..",
    ".",
    "",
    "../../etc/passwd",
    "a/b",
    "a\0b",
    "a\nb",
    " ",
    "-rf",
    "~",
    "é",
    "\u0660\u0660",
    "00 ",
    "00\n",
    "0" * 300,
    ".kv",
    "zz.kv",
    "00.kv",
    "00" * 11 + ".kv",
    "00" * 65 + ".kv",
    "0" * 25 + ".kv",
    "AB" * 16 + ".kv",
    "00" * 16 + ".KV",
    "00" * 16 + ".kv.tmp",
    "00" * 16 + ".kv\n",
    "x" + "00" * 16 + ".kv",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_outside_every_grammar(name):
    """Digits of other scripts, line ends, case, lengths: nothing slips through."""
    assert blob_key(name) is None
    assert not is_fan(name)
    assert not is_namespace(name)
    assert not is_writer(name)


@pytest.mark.parametrize("name", HOSTILE_NAMES[:16])
def test_a_pin_cannot_leave_its_directory(here, name):
    """A name that is no plain file name is refused before any path is built of it."""
    with pytest.raises(InvalidError, match="a pin's name"):
        Pins(here.root).read(name)


@pytest.fixture
def haunted(tmp_path: Path) -> Fixture:
    """A root with one blob among links, fifos, directories and misplaced files."""
    here = Fixture(str(tmp_path / "root"))
    here.store(KEY)
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("00", "00/00"):
        (secret / name).mkdir()
    (secret / "00" / "00" / ("00" * 36 + ".kv")).write_bytes(bytes(8192))
    leaf = here.file_of(KEY).parent
    prefix = leaf.parent.name + leaf.name
    namespace = Path(here.root.layout.namespace(here.namespace))
    (leaf / (prefix + "11" * 34 + ".kv")).symlink_to(here.file_of(KEY))
    (leaf / (prefix + "22" * 34 + ".kv")).mkdir()
    os.mkfifo(leaf / (prefix + "33" * 34 + ".kv"))
    (leaf / ("44" * 36 + ".kv")).write_bytes(here.file_of(KEY).read_bytes())
    (leaf / (prefix + "55" * 34 + ".kv.tmp")).touch()
    (leaf / "README").touch()
    (leaf / os.fsdecode(b"\xff\xfe.kv")).touch()
    other = next(fan for fan in ("a0", "a1") if not (namespace / fan).exists())
    (namespace / other).symlink_to(secret / "00")
    (namespace / "zz").mkdir()
    (namespace / "0").mkdir()
    (namespace / "ab").touch()
    return here


def test_a_scan_sees_blobs_in_their_places_only(haunted):
    """No link is followed, no fifo opened, no file of another directory taken for a blob."""
    found = [entry.key for _, leaf in haunted.tree.scan(haunted.namespace) for entry in leaf]

    assert found == [KEY]


def test_a_linked_directory_is_not_walked(haunted, tmp_path):
    """A namespace's own directories are real ones."""
    leaves = [name for name, _ in haunted.tree.scan(haunted.namespace)]

    digits = KEY.hex()
    assert leaves == [(digits[:2], digits[2:4])]


def test_a_fifo_in_a_blobs_place_hangs_nobody(here):
    """Opening it for reading would wait for a writer for ever."""
    here.store(KEY)
    here.file_of(KEY).unlink()
    os.mkfifo(here.file_of(KEY))

    assert here.load(KEY) == "io"
    assert here.tree.probe(here.namespace, KEY) is None
    assert not here.store(KEY).existed
    assert here.load(KEY) == payload_of(KEY)


def test_a_reaper_stays_within_the_root(here, tmp_path):
    """Links planted where temporary files, documents and corrupt blobs lie lead nobody outside."""
    writer = "ab" * 16
    victim = tmp_path / "victim"
    victim.mkdir()
    temporary = Path(here.root.layout.temporary(here.namespace, KEY, writer=writer, number=1))
    precious = ["precious.tmp", temporary.name, f"{writer}.json", f"digest.00000000.{'00' * 36}.kv"]
    for name in precious:
        (victim / name).write_text("mine")
        os.utime(victim / name, (1, 1))
    Path(here.root.layout.namespaces, "cd" * 16).symlink_to(victim)
    temporary.parent.parent.mkdir()
    temporary.parent.symlink_to(victim)
    Path(here.root.layout.writer(writer)).symlink_to(victim / f"{writer}.json")
    for place in ("pins", "quarantine", "writers"):
        Path(here.path, place, "ef" * 16).symlink_to(victim)
        Path(here.path, place, precious[3]).symlink_to(victim / precious[3])

    here.writers.reap(server_now_s=1e12, spare="", thorough=True)
    here.store(key_of("two"))
    here.damage(key_of("two"))
    Quarantine(here.root, bytes_max=0).take(here.namespace, key_of("two"), MissReason.DIGEST)

    assert sorted(path.name for path in victim.iterdir()) == sorted(precious)
    assert {(victim / name).read_text() for name in precious} == {"mine"}


def test_a_root_behind_a_linked_identity_is_not_opened(tmp_path):
    """store.json is a file, not a way to somebody else's."""
    Root.create(str(tmp_path / "real"), os_calls=QuickOs())
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "store.json").symlink_to(tmp_path / "real" / "store.json")

    with pytest.raises(OSError, match="symbolic link"):
        Root.open(str(tmp_path / "fake"), os_calls=QuickOs())


def test_a_file_longer_than_any_blob_is_none(here):
    """A sparse file of gigabytes has a name and whole pages, and a size that no index can hold."""
    here.store(KEY)
    os.truncate(here.file_of(KEY), 5 * 2**30)

    assert here.tree.probe(here.namespace, KEY) is None
    assert not here.store(KEY).existed
    assert here.load(KEY) == payload_of(KEY)
