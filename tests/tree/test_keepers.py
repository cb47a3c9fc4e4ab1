"""Pins, writers and the quarantine: small files that other hosts rely on."""

import errno
import os
import socket
import time
from pathlib import Path

import msgspec
import pytest

from prefixstore.blob.reasons import MissReason
from prefixstore.config import DOCUMENT_BYTES_MAX
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.testing.faults import Fail, FaultyOs, Kill, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.pins import Pin, Pins, pinned_keys
from prefixstore.tree.quarantine import FILES_MAX, Quarantine
from prefixstore.tree.root import Root
from prefixstore.tree.writers import PRESUMED_DEAD_S, WriterDocument, Writers, this_process
from tests.tree.trees import KILLED, Fixture, in_child, key_of, payload_of

KEY = key_of("one")


def a_pin(here: Fixture, *, name: str = "system", ends_at_s: int | None = None) -> Pin:
    keys = (key_of("a"), key_of("b"))
    return Pin(name=name, namespace=here.namespace, keys=keys, created_s=100, ends_at_s=ends_at_s)


# Pins.


def test_a_pin_survives_the_round_trip(here):
    """Name, namespace, keys in order, and end."""
    pin = a_pin(here, ends_at_s=200)

    Pins(here.root).write(pin)

    assert list(Pins(here.root)) == [pin]


def test_a_pin_is_replaced_whole_and_removed_once(here):
    """The last writer of a name wins; removing says whether there was one."""
    pins = Pins(here.root)
    pins.write(a_pin(here))
    pins.write(a_pin(here, ends_at_s=200))

    assert [pin.ends_at_s for pin in pins] == [200]
    assert pins.remove("system")
    assert not pins.remove("system")
    assert list(pins) == []


def test_a_pin_holds_until_it_ends(here):
    """A key under two pins is kept until both have ended."""
    pins = [a_pin(here, name="short", ends_at_s=200), a_pin(here, name="long")]
    address = (here.namespace, key_of("a"))

    assert pinned_keys(pins, now_s=199)[address] == 2
    assert pinned_keys(pins, now_s=200)[address] == 1


def test_a_pin_is_on_the_disk_on_return(tmp_path):
    """What it keeps is gone for good otherwise, if the power fails and eviction comes first."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    faulty.reset()

    Pins(here.root).write(a_pin(here))

    names = [call.name for call in faulty.calls]
    assert names.index("write_from") < names.index("sync_data") < names.index("rename")


def test_a_pin_without_keys_is_refused(here):
    """It would keep nothing, and look as if it did."""
    with pytest.raises(InvalidError, match="names no key"):
        Pins(here.root).write(Pin(name="x", namespace=here.namespace, keys=(), created_s=1))


def test_a_pin_that_nobody_could_read_is_not_written(here):
    """A document over the limit would stop eviction for ever; the old one stays."""
    pins = Pins(here.root)
    pins.write(a_pin(here))
    keys = (key_of("a"),) * (DOCUMENT_BYTES_MAX // 60)

    with pytest.raises(InvalidError, match="at most"):
        pins.write(Pin(name="system", namespace=here.namespace, keys=keys, created_s=1))

    assert list(pins) == [a_pin(here)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"namespace": "x", "keys": [], "created_s": 1, "ends_at_s": null}',
        b'{"namespace": "NS", "keys": ["zz"], "created_s": 1, "ends_at_s": null}',
        b'{"namespace": "NS", "keys": ["00"], "created_s": 1, "ends_at_s": null}',
        b'{"namespace": "NS", "keys": [7], "created_s": 1, "ends_at_s": null}',
        b'{"namespace": "NS", "created_s": 1, "ends_at_s": null}',
    ],
)
def test_a_damaged_pin_stops_eviction_instead_of_being_skipped(here, content):
    """Nobody knows what it kept; guessing would lose it."""
    path = Path(here.root.layout.pin("system"))
    path.write_bytes(content.replace(b"NS", here.namespace.encode()))

    with pytest.raises(InvalidError):
        list(Pins(here.root))


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["scan", "open", "read_into", "stat_open"])
def test_pins_that_cannot_be_read_are_not_taken_for_none(tmp_path, error, name):
    """A stale handle or a sick server must not free what is pinned."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    Pins(here.root).write(a_pin(here))
    faulty.reset(When(fault=Fail(error), name=name, forever=True))

    with pytest.raises(UnavailableError):
        list(Pins(here.root))


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("name", ["read_into", "stat_open"])
def test_a_pin_that_is_replaced_while_it_is_read_is_read_again(tmp_path, error, name):
    """Another host's rename takes the file from under the handle, and the new one is there."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    Pins(here.root).write(a_pin(here))
    faulty.reset(When(fault=Fail(error), name=name, nth=1))

    assert list(Pins(here.root)) == [a_pin(here)]


def test_temporary_names_among_pins_are_no_pins(here):
    """What a killed writer left beside its pin is ignored."""
    Path(here.root.layout.pin("system") + ".0123.tmp").write_text("{")
    (Path(here.root.layout.pins) / "README").touch()

    assert list(Pins(here.root)) == []


# Writers.


def orphan(here: Fixture, writer: str, document: WriterDocument | None) -> Path:
    """Leave an unpublished blob behind, as a writer of that description that is killed in a store."""

    def die() -> None:
        faulty = FaultyOs(QuickOs())
        there = Fixture(here.path, faulty, writer=writer)
        if document is not None:
            Writers(there.root, this=document).register(writer)
        faulty.reset(When(fault=Kill(share=0.5), name="write_from"))
        there.store(key_of(writer))

    before = set(here.temporaries())
    assert in_child(die) == KILLED
    (left,) = set(here.temporaries()) - before
    return Path(left)


def reap(here: Fixture, *, server_now_s: float | None = None, thorough: bool = False) -> None:
    now_s = time.time() if server_now_s is None else server_now_s
    Writers(here.root, this=this_process()).reap(
        server_now_s=now_s, spare="0" * 32, thorough=thorough
    )


def changed(**changes: object) -> WriterDocument:
    return msgspec.structs.replace(this_process(), **changes)


WRITER = "ab" * 16


def test_a_living_writer_keeps_its_files(here):
    """This very process, under another writer's id, however long it was silent."""
    kept = orphan(here, WRITER, this_process())

    reap(here, server_now_s=time.time() + 100 * PRESUMED_DEAD_S)

    assert kept.exists()


def test_the_callers_own_files_are_spared(here):
    """Whoever reaps has stores on their way."""
    kept = orphan(here, "0" * 32, None)

    reap(here, server_now_s=time.time() + 100 * PRESUMED_DEAD_S, thorough=True)

    assert kept.exists()


def test_a_killed_writer_is_reaped_at_once(here):
    """Its host proves that its process is gone; no waiting for a timeout."""

    def announce() -> None:
        Writers(here.root, this=this_process()).register(WRITER)

    assert in_child(announce) == 0
    gone = orphan(here, WRITER, None)

    reap(here)

    assert not gone.exists()
    assert not Path(here.root.layout.writer(WRITER)).exists()


def test_blobs_are_listed_only_for_the_sake_of_the_dead(here):
    """Every engine reaps when it opens a root; 65,536 listings are not for every one of them."""
    here.store(KEY)
    orphan(here, WRITER, None)
    counting = FaultyOs(QuickOs())
    there = Fixture(here.path, counting)
    Writers(there.root, this=this_process()).register("cd" * 16)
    counting.reset()

    Writers(there.root, this=this_process()).reap(server_now_s=time.time(), spare="0" * 32)

    leaf = str(here.file_of(KEY).parent)
    assert leaf not in {call.path for call in counting.calls}


def test_a_reused_process_id_is_another_process(here):
    """The same pid with another start time is a writer that is dead."""
    gone = orphan(here, WRITER, changed(started="1"))

    reap(here)

    assert not gone.exists()


@pytest.mark.parametrize(
    "document",
    [
        changed(host="elsewhere"),
        changed(pid_namespace="pid:[1]", started="1"),
        changed(started=""),
        None,
    ],
    ids=["another host", "another container", "its start is not told", "no document"],
)
def test_a_writer_that_cannot_be_judged_is_presumed_dead_after_a_day(here, document):
    """By the file server's clock, of its document and its files."""
    file = orphan(here, WRITER, document)
    touched_s = time.time()

    reap(here, server_now_s=touched_s + PRESUMED_DEAD_S - 60, thorough=document is None)
    assert file.exists()
    reap(here, server_now_s=touched_s + PRESUMED_DEAD_S + 60, thorough=document is None)
    assert not file.exists()


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_looked_at_is_not_reaped(tmp_path, error):
    """A sick server shows nobody that a file is old."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    file = orphan(here, WRITER, changed(host="elsewhere"))
    faulty.reset(When(fault=Fail(error), name="stat", forever=True))

    reap(here, server_now_s=time.time() + 2 * PRESUMED_DEAD_S, thorough=True)

    assert file.exists()


def test_a_refreshed_writer_lives_on(here):
    """Its document's time is its sign of life, by the server's clock."""
    file = orphan(here, WRITER, changed(host="elsewhere"))
    for path in (Path(here.root.layout.writer(WRITER)), file):
        os.utime(path, (1, 1))

    Writers(here.root, this=this_process()).refresh(WRITER)
    reap(here, server_now_s=time.time() + PRESUMED_DEAD_S / 2)

    assert file.exists()


def test_a_writer_that_is_reaped_by_mistake_is_announced_again(here):
    """Refreshing writes the document anew where it has gone."""
    writers = Writers(here.root, this=this_process())

    writers.refresh(WRITER)

    assert writers.known() == {WRITER: this_process()}


def test_leaving_takes_the_announcement_along(here):
    """An orderly end leaves nothing to reap."""
    writers = Writers(here.root, this=this_process())
    writers.register(WRITER)

    writers.leave(WRITER)

    assert writers.known() == {}


def test_a_damaged_writer_document_is_no_document(here):
    """Its files are reaped by age, and nobody fails on it."""
    file = orphan(here, WRITER, None)
    Path(here.root.layout.writer(WRITER)).write_bytes(b"[" * 100_000)

    reap(here)
    assert file.exists()
    reap(here, server_now_s=time.time() + 2 * PRESUMED_DEAD_S)
    assert not file.exists()


def test_the_published_blob_of_a_dead_writer_stays(here):
    """What goes is the temporary name, also where it is a second one of a published blob."""

    def die() -> None:
        faulty = FaultyOs(QuickOs())
        there = Fixture(here.path, faulty, writer=WRITER)
        faulty.reset(When(fault=Kill(), name="unlink"))
        there.store(KEY)

    assert in_child(die) == KILLED
    assert len(here.temporaries()) == 1

    reap(here, server_now_s=time.time() + 2 * PRESUMED_DEAD_S, thorough=True)

    assert here.temporaries() == []
    assert here.load(KEY) == payload_of(KEY)


def test_this_process_is_described_so_that_others_can_judge_it():
    """Host, boot, pid and start time are all known on Linux."""
    here = this_process()

    assert (here.host, here.pid) == (socket.gethostname(), os.getpid())
    assert all((here.boot_id, here.pid_namespace, here.started))


# The quarantine.


def test_a_quarantined_blob_makes_room_for_a_sound_one(here):
    """It is out of the way, kept for people, and the key can be stored again."""
    here.store(KEY)
    here.damage(KEY)

    assert Quarantine(here.root, bytes_max=2**20).take(here.namespace, KEY, MissReason.DIGEST)

    (name, stat), *others = Quarantine(here.root, bytes_max=0).contents()
    assert others == []
    assert name.startswith("digest.")
    assert name.endswith(f".{KEY.hex()}.kv")
    assert stat.size_bytes > 4096
    assert not here.store(KEY).existed
    assert here.load(KEY) == payload_of(KEY)


def test_a_blob_that_is_gone_is_not_quarantined(here):
    """Another host was first."""
    assert not Quarantine(here.root, bytes_max=1).take(here.namespace, KEY, MissReason.DIGEST)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_sound_blob_gets_its_name_back(here, has_links):
    """Somebody has stored the key between the reading that condemned the file and its removal."""
    here.store(KEY)
    refused = () if has_links else When(fault=Fail(errno.ENOTSUP), name="link", forever=True)
    calls = FaultyOs(here.os_calls, refused)
    root = Root.open(here.path, os_calls=calls)

    assert not Quarantine(root, bytes_max=2**20).take(here.namespace, KEY, MissReason.TORN)
    assert here.load(KEY) == payload_of(KEY)
    assert Quarantine(root, bytes_max=2**20).contents() == []


def test_a_sound_blob_whose_name_is_taken_meanwhile_is_dropped(here):
    """One is enough, and the quarantine is for damaged ones."""
    here.store(KEY)

    class Overtaken(QuickOs):
        def rename(self, source, target):
            super().rename(source, target)
            here.store(KEY)

    root = Root.open(here.path, os_calls=Overtaken())
    assert not Quarantine(root, bytes_max=2**20).take(here.namespace, KEY, MissReason.DIGEST)
    assert here.load(KEY) == payload_of(KEY)
    assert Quarantine(root, bytes_max=2**20).contents() == []


@pytest.mark.parametrize("has_header", [True, False])
def test_a_long_file_is_no_blob_by_its_first_page(here, has_header):
    """Garbage can be as long as a disk is: it is not read into memory to be looked at."""
    here.store(KEY)
    with here.file_of(KEY).open("r+b") as file:
        if not has_header:
            file.truncate(0)
        file.truncate(2**40)

    class Frugal(QuickOs):
        def read_into(self, fd, target, offset):
            assert len(target) <= 4096
            return super().read_into(fd, target, offset)

    root = Root.open(here.path, os_calls=Frugal())
    assert Quarantine(root, bytes_max=2**20).take(here.namespace, KEY, MissReason.TORN)


def test_a_removed_quarantine_is_made_again(here):
    """An operator who empties it with ``rm -r`` must not leave damaged blobs in place for ever."""
    Path(here.root.layout.quarantine).rmdir()
    here.store(KEY)
    here.damage(KEY)

    assert Quarantine(here.root, bytes_max=2**20).take(here.namespace, KEY, MissReason.DIGEST)
    assert here.load(KEY) == "absent"


def test_the_quarantine_is_bounded_in_bytes_and_files(here):
    """The oldest go first."""
    quarantine = Quarantine(here.root, bytes_max=100_000)
    for number in range(8):
        here.store(key_of(str(number)))
        here.damage(key_of(str(number)))
        quarantine.take(here.namespace, key_of(str(number)), MissReason.DIGEST)

    contents = quarantine.contents()
    assert 0 < sum(stat.disk_bytes for _, stat in contents) <= 100_000
    assert any(key_of("7").hex() in name for name, _ in contents)
    assert not any(key_of("0").hex() in name for name, _ in contents)

    for number in range(FILES_MAX + 10):
        path = Path(here.root.layout.quarantine) / f"torn.{number:08x}.{'00' * 36}.kv"
        path.touch()
    here.store(KEY)
    here.damage(KEY)
    quarantine.take(here.namespace, KEY, MissReason.DIGEST)
    assert len(quarantine.contents()) <= FILES_MAX
