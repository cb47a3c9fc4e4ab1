"""Each call of the system, killed or failed in turn: what is left is the blob, or nothing, and heals.

Every scenario is run once to learn its calls, then once for each call and each fault that it can meet.
After each: what was published before is still there, byte by byte; what was being published is there whole
or is a miss; errors are ours; the next store of the key succeeds; and nothing is left in ``tmp`` once the
dead writer is reaped.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefixstore.config import Codec, StoreConfig
from prefixstore.errors import FullError, PrefixStoreError, UnavailableError
from prefixstore.testing.faults import (
    ERRNOS,
    Call,
    Cut,
    Fail,
    Fault,
    FaultyOs,
    Kill,
    When,
    faults_of,
    full_disk,
)
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.blobs import BlobTree, Stored
from prefixstore.tree.pins import Pin, Pins
from prefixstore.tree.quarantine import Quarantine
from prefixstore.tree.root import Root
from tests.tree.trees import FIELDS, KILLED, Fixture, in_child, key_of, payload_of

pytestmark = pytest.mark.crash

NEW, OLD = key_of("new"), key_of("old")

NO_LINKS = When(fault=Fail(errno.EPERM), name="link", forever=True)
"""A filesystem without hard links."""

Prepare = Callable[[Fixture], object]


def nothing(here: Fixture) -> None:
    """No preparation."""


def leaf_exists(here: Fixture) -> None:
    here.store(NEW)
    here.file_of(NEW).unlink()


def torn_final(here: Fixture) -> None:
    here.store(NEW)
    os.truncate(here.file_of(NEW), 5000)


SCENARIOS: dict[str, tuple[Prepare, dict[str, object], Codec, list[When]]] = {
    "first in its directory": (nothing, {}, Codec.RAW, []),
    "directory exists": (leaf_exists, {}, Codec.RAW, []),
    "torn final": (torn_final, {}, Codec.RAW, []),
    "compressed": (nothing, {}, Codec.SHUFFLE_ZSTD, []),
    "durable": (nothing, {"durability": "full"}, Codec.RAW, []),
    "shared by a group": (nothing, {"group_shared": True}, Codec.RAW, []),
    "direct": (nothing, {"direct_io": "auto"}, Codec.RAW, []),
    "without links": (nothing, {}, Codec.RAW, [NO_LINKS]),
    "without links, torn final": (torn_final, {}, Codec.RAW, [NO_LINKS]),
}


class Sweep:
    """One scenario of storing ``NEW``, on a copy of a prepared root for each fault."""

    def __init__(self, base: Path, name: str) -> None:
        self.prepare, self.options, self.codec, self.standing = SCENARIOS[name]
        self.template = base / "template"
        self.path = base / "root"
        here = Fixture(str(self.template), options=self.options)
        here.store(OLD)
        self.prepare(here)
        here.writers.leave(here.tree.writer)

    def open(self, *plan: When) -> tuple[Fixture, FaultyOs]:
        """Open a fresh copy of the prepared root; faults begin when the store does."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.template, self.path, symlinks=True)
        faulty = FaultyOs(QuickOs())
        here = Fixture(str(self.path), faulty, self.options)
        here.writers.register(here.tree.writer)
        faulty.reset([*plan, *self.standing])
        return here, faulty

    def calls(self) -> list[Call]:
        """Return the calls of an undisturbed store."""
        here, faulty = self.open()
        here.store(NEW, codec=self.codec)
        return list(faulty.calls)

    def check(self, told: Stored | None) -> str:
        """Check what is left, heal it, and check again; return what a load gave at first."""
        after = Fixture(str(self.path), options=self.options)
        found = after.load(NEW)
        assert found in (payload_of(NEW), "absent", "torn"), found
        if told is not None:
            assert found == payload_of(NEW), "a store said it was published"
        assert after.load(OLD) == payload_of(OLD), "published before"

        after.store(NEW, codec=self.codec)
        assert after.load(NEW) == payload_of(NEW)
        return "published" if found == payload_of(NEW) else str(found)

    def check_reaped(self) -> None:
        after = Fixture(str(self.path), options=self.options)
        after.writers.reap(server_now_s=0.0, spare=after.tree.writer)
        assert after.temporaries() == []
        assert list(Path(after.root.layout.writers).iterdir()) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_store_that_is_killed_leaves_the_blob_or_nothing(quick_path, name):
    """SIGKILL at each call, and in the middle of each write."""
    sweep = Sweep(quick_path, name)
    seen = set()
    for call in sweep.calls():
        for fault in faults_of(call.name):
            if not isinstance(fault, Kill):
                continue
            when = When(number=call.number, fault=fault)

            def store(when: When = when) -> None:
                here, _ = sweep.open(when)
                here.store(NEW, codec=sweep.codec)

            assert in_child(store) == KILLED, when
            seen.add(sweep.check(None))
            sweep.check_reaped()
    assert "published" in seen
    assert seen & {"absent", "torn"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_store_that_fails_says_so_and_leaves_the_blob_or_nothing(quick_path, name):
    """Every errno at each call, answers that were lost, and writes that were cut short."""
    sweep = Sweep(quick_path, name)
    for call in sweep.calls():
        for fault in faults_of(call.name):
            if isinstance(fault, Kill):
                continue
            here, faulty = sweep.open(When(number=call.number, fault=fault))
            told = stored_or_error(here, sweep)
            assert fits(told, fault), (call, fault, told)
            assert len(faulty.calls) < 60, "no endless retries"
            left = here.temporaries()
            assert left == [] or call.name in ("unlink", "link"), (call, fault, left)
            sweep.check(told if isinstance(told, Stored) else None)


def stored_or_error(here: Fixture, sweep: Sweep) -> Stored | PrefixStoreError:
    """Store; no error but ours may come out."""
    try:
        return here.store(NEW, codec=sweep.codec)
    except PrefixStoreError as error:
        return error


def fits(told: Stored | PrefixStoreError, fault: Fault) -> bool:
    """Whether a failure is told as what it is, with the path that met it."""
    match told:
        case FullError():
            is_full = isinstance(fault, Fail) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
            return is_full and str(errno.errorcode[fault.errno]) in str(told)
        case UnavailableError():
            is_full = isinstance(fault, Fail) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
            return not is_full and "/root/" in str(told)
        case Stored():
            return True
        case _:
            return False


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_disk_that_fills_up_is_full_and_heals(quick_path, name, error):
    """A short write first, then refusals; nothing stays behind, and loads go on."""
    sweep = Sweep(quick_path, name)
    writes = [call.number for call in sweep.calls() if call.name == "write_from"]
    assert writes
    for number in writes:
        here, _ = sweep.open(*full_disk(number, error=error))
        with pytest.raises(FullError):
            here.store(NEW, codec=sweep.codec)
        assert here.temporaries() == []
        assert here.load(OLD) == payload_of(OLD)
        sweep.check(None)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_load_that_fails_is_a_miss_or_the_bytes(quick_path, codec, direct_io):
    """Errors and short reads at each call of a load; none is raised, none brings other bytes."""
    options = {"direct_io": direct_io}
    Fixture(str(quick_path / "root"), options=options).store(OLD, codec=codec)
    trace = FaultyOs(QuickOs())
    here = Fixture(str(quick_path / "root"), trace, options)
    trace.reset()
    here.load(OLD)
    outcomes: dict[str, set[tuple[object, str]]] = {}
    for call in list(trace.calls):
        for fault in [*faults_of(call.name), Fail(errno.ENOENT), Fail(errno.ENOTCONN), Cut(0.9)]:
            if isinstance(fault, Kill):
                continue
            trace.reset(When(number=call.number, fault=fault))
            found = here.load(OLD)
            assert found in (payload_of(OLD), "absent", "io", "torn"), (call, fault)
            label = fault.errno if isinstance(fault, Fail) else type(fault).__name__
            outcomes.setdefault(call.name, set()).add((label, str(found)[:6]))
            trace.reset()
            assert here.load(OLD) == payload_of(OLD)

    assert (errno.ESTALE, "absent") in outcomes["open"] & outcomes["read_into"]
    assert (errno.EIO, "io") in outcomes["open"] & outcomes["read_into"]
    # Closing a file that was only read loses nothing, whatever it reports.
    assert {what for _, what in outcomes["close"]} == {str(payload_of(OLD))[:6]}


@pytest.mark.parametrize("name", ["link", "rename"], ids=["with links", "without links"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EEXIST, errno.ENOENT, errno.ETIMEDOUT])
@pytest.mark.parametrize("prepare", [leaf_exists, torn_final])
def test_a_lost_answer_is_looked_into(quick_path, name, error, prepare):
    """The server did it, and the repeated request failed because it was done: that is a success."""
    prepare(Fixture(str(quick_path / "root")))
    faulty = FaultyOs(QuickOs())
    there = Fixture(str(quick_path / "root"), faulty)
    lost = When(name=name, nth=1, fault=Fail(error, after=True))
    faulty.reset([lost, NO_LINKS] if name == "rename" else [lost])

    assert not there.store(NEW).existed

    assert there.load(NEW) == payload_of(NEW)
    assert there.temporaries() == []


def test_a_sound_blob_that_comes_first_wins(quick_path):
    """Between the look and the link, another writer publishes the key."""
    here = Fixture(str(quick_path / "root"))
    other = Fixture(str(quick_path / "root"))
    trap = Trap(QuickOs(), "link", lambda: other.store(NEW))
    late = Fixture(str(quick_path / "root"), trap)

    assert late.store(NEW).existed

    assert trap.sprung
    assert here.load(NEW) == payload_of(NEW)
    assert here.temporaries() == []


def test_without_links_a_sound_blob_that_comes_first_wins(quick_path):
    """A rename would replace it: so the writer looks once more."""
    here = Fixture(str(quick_path / "root"))
    leaf_exists(here)
    first = Fixture(str(quick_path / "root"))
    trap = Trap(QuickOs(), "link", lambda: first.store(NEW))
    late = Fixture(str(quick_path / "root"), trap)
    trap.reset(NO_LINKS)

    assert late.store(NEW).existed

    assert trap.sprung
    assert here.load(NEW) == payload_of(NEW)
    assert here.temporaries() == []


def test_a_temporary_name_that_is_taken_is_left_alone(quick_path):
    """Whoever else has this writer's name, by a fork, goes on writing its own file."""
    here = Fixture(str(quick_path / "root"))
    leaf_exists(here)
    taken = Path(here.root.layout.temporary(here.namespace, NEW, writer=here.tree.writer, number=1))
    taken.write_bytes(b"being written")

    assert not here.store(NEW).existed

    assert taken.read_bytes() == b"being written"
    assert here.load(NEW) == payload_of(NEW)


class LosingOs(QuickOs):
    """A filesystem that takes every byte and loses the last page, as a full thin volume may."""

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        super().write_from(fd, source[:-4096], offset)
        return len(source)


def test_a_filesystem_that_lies_about_a_write_is_found_out(quick_path):
    """The file's length is looked at before it gets its name."""
    here = Fixture(str(quick_path / "root"))
    root = Root(
        store_id=here.root.store_id,
        layout=here.root.layout,
        os_calls=LosingOs(),
        group_shared=False,
    )
    here.tree = BlobTree(root, config=StoreConfig(direct_io="off"))

    with pytest.raises(UnavailableError, match="on disk after writing"):
        here.store(NEW)

    assert here.load(NEW) == "absent"
    assert here.temporaries() == []


def test_a_torn_blob_that_comes_first_is_replaced(quick_path):
    """Between the look and the link, a name appears on a file that a power cut has emptied."""
    here = Fixture(str(quick_path / "root"))
    leaf_exists(here)
    trap = Trap(QuickOs(), "link", lambda: here.file_of(NEW).touch())
    late = Fixture(str(quick_path / "root"), trap)

    assert not late.store(NEW).existed

    assert trap.sprung
    assert here.load(NEW) == payload_of(NEW)


def test_a_blob_that_comes_first_and_goes_again_is_stored(quick_path):
    """Published by another and evicted at once: told as stored only because it is."""
    here = Fixture(str(quick_path / "root"))
    leaf_exists(here)
    trap = Trap(QuickOs(), "link", lambda: here.store(NEW), then=lambda: here.file_of(NEW).unlink())
    late = Fixture(str(quick_path / "root"), trap)

    assert not late.store(NEW).existed

    assert here.load(NEW) == payload_of(NEW)


class Trap(FaultyOs):
    """Does something before the first call of a name, and something after it."""

    def __init__(
        self,
        inner: QuickOs,
        name: str,
        first: Callable[[], object],
        *,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(inner)
        self.sprung = False
        self._trap = (name, first, then)

    def link(self, source: str, target: str) -> None:
        name, first, then = self._trap
        if name != "link" or self.sprung or "/ns/" not in target or target.endswith(".json"):
            super().link(source, target)
            return
        self.sprung = True
        first()
        try:
            super().link(source, target)
        finally:
            then()


# Everything else that is written under a root.


def make_root(path: Path, faulty: FaultyOs) -> None:
    Root.create(str(path / "root"), os_calls=faulty).namespace(FIELDS, create=True)


def write_pin(path: Path, faulty: FaultyOs) -> None:
    root = Root.create(str(path / "root"), os_calls=faulty)
    Pins(root).write(a_pin(root, NEW))


def quarantine(path: Path, faulty: FaultyOs) -> None:
    here = Fixture(str(path / "root"), faulty)
    Quarantine(here.root, bytes_max=10_000).take(here.namespace, NEW, "digest")


def a_pin(root: Root, key: object) -> Pin:
    namespace = root.namespace(FIELDS, create=True)
    return Pin(name="system", namespace=namespace, keys=(key,), created_s=1)


def error_of(
    work: Callable[[Path, FaultyOs], None], path: Path, faulty: FaultyOs
) -> PrefixStoreError | None:
    try:
        work(path, faulty)
    except PrefixStoreError as error:
        return error
    return None


def faults_at_each_call(work: Callable[[Path, FaultyOs], None], base: Path) -> Iterator[Path]:
    """Run ``work`` with each fault at each call on a copy of ``base``; yield what each left."""
    trace = FaultyOs(QuickOs())
    once = base.parent / "once"
    shutil.copytree(base, once)
    work(once, trace)
    for call in trace.calls:
        for number, fault in enumerate(faults_of(call.name)):
            path = base.parent / f"{call.number}.{number}"
            shutil.copytree(base, path)
            faulty = FaultyOs(QuickOs(), When(number=call.number, fault=fault))
            if isinstance(fault, Kill):
                assert in_child(lambda path=path, faulty=faulty: work(path, faulty)) == KILLED
            else:
                error = error_of(work, path, faulty)
                assert isinstance(error, FullError | UnavailableError | None), (call, fault)
            yield path
            shutil.rmtree(path)


def test_making_a_root_can_fail_anywhere_and_be_repeated(quick_path):
    """A second try finds a root, or makes it; a half-made one is never taken for a foreign directory."""
    base = quick_path / "base"
    base.mkdir()
    count = 0
    for path in faults_at_each_call(make_root, base):
        root = Root.create(str(path / "root"))
        assert root.manifest(root.namespace(FIELDS, create=True)) is not None
        count += 1
    assert count > 100


def test_replacing_a_pin_can_fail_anywhere_and_keeps_one_of_the_two(quick_path):
    """A pin is never half written and never lost: what it keeps is somebody's system prompt."""
    base = quick_path / "base"
    root = Root.create(str(base / "root"))
    Pins(root).write(a_pin(root, OLD))
    seen = set()
    for path in faults_at_each_call(write_pin, base):
        pins = list(Pins(Root.open(str(path / "root"))))
        assert len(pins) == 1
        seen.add(pins[0].keys[0])
    assert seen == {NEW, OLD}


def test_quarantine_can_fail_anywhere_and_loses_no_other_blob(quick_path):
    """The damaged blob is here or there; sound ones stay."""
    base = quick_path / "base"
    here = Fixture(str(base / "root"))
    here.store(OLD)
    here.store(NEW)
    content = bytearray(here.file_of(NEW).read_bytes())
    content[6000] ^= 1
    here.file_of(NEW).write_bytes(content)
    for path in faults_at_each_call(quarantine, base):
        after = Fixture(str(path / "root"))
        assert after.load(NEW) in ("digest", "absent")
        assert after.load(OLD) == payload_of(OLD)


def test_errnos_are_those_of_shared_filesystems():
    """The sweep above means what the design asks for."""
    assert {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ESTALE,
        errno.EACCES,
        errno.EROFS,
    } == set(ERRNOS)
