"""Each call of the system, killed or failed in turn, under a day's work of a store: what is left is sound.

The work: open a root with an old chain, find it, store a new chain, load both, touch, evict, close. Run
once to learn its calls, then once for each call and each fault that it can meet. After each:

    never wrong bytes      every key loads its own payload, or misses with a reason
    nothing is lost        what was published is there, unless the eviction that ran counted it out
    pins hold              pinned chunks and their ancestors are there
    counts are right       the reconciled index equals a recount of the tree
    no exception           but from opening, and that one is ours
    it heals               the next store of every chunk succeeds
"""

import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import (
    FIELDS,
    FILE_BYTES,
    chain,
    chunk_at,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.faults import Call, Fail, Fault, FaultyOs, Kill, When, faults_of, full_disk
from prefixstore.testing.model import recount
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.osfs import Os

pytestmark = pytest.mark.crash

OLD, NEW = chain("old", 4), chain("new", 3)
PINNED = OLD[1]
KEEP_CHUNKS = 5
SPOILED = {"absent", "io", "torn", "header", "digest"}
"""Misses that one fault may cause. None of them condemns a blob: it is read again before."""


@dataclass
class Diary:
    """What the work has seen, written down as it goes, so that it outlives a kill."""

    opened: bool = False
    published: set[Key] = field(default_factory=set)
    evicting: bool = False
    gone: int = 0
    """Chunks that the eviction removed, or may have: a failed unlink may have happened."""
    quarantined: int = 0
    wrong: list[str] = field(default_factory=list)


def open_root(path: str, calls: Os) -> PrefixStore:
    """Open the root without background threads and with an index that knows nothing."""
    config = StoreConfig(direct_io="off", touch_interval_s=0, max_bytes=2**40)
    return PrefixStore.open(
        path, namespace=FIELDS, config=config, index=None, os_calls=calls, background=False
    )


def work(path: str, calls: Os, diary: Diary, note: "Note") -> None:
    """Do a day's work; an exception that is not ours, or not at the opening, fails the test."""
    try:
        store = open_root(path, calls)
    except PrefixStoreError:
        return
    diary.opened = True
    try:
        store.reconcile()
        store.longest_prefix(OLD)
        store.contains(NEW)
        for at in range(len(NEW)):
            if store.store(chunk_at(NEW, at), payload_of(NEW[at])).published:
                diary.published.add(NEW[at])
                note(diary)
        for key in OLD + NEW:
            found = load(store, key)
            if found not in (payload_of(key), *SPOILED):
                diary.wrong.append(f"{key.hex()}: {found!r:.60}")
        store.touch(OLD)
        store.work()
        diary.evicting = True
        note(diary)
        report = store.evict(KEEP_CHUNKS * FILE_BYTES)
        # A full disk has the background evict, too.
        counters = store.counters()
        diary.gone = counters.get("evicted", 0) + report.kept.get("error", 0)
        diary.quarantined = counters.get("quarantined", 0)
        if counters.get("background_failures"):
            diary.wrong.append("an exception in the background")
    finally:
        store.close()
    note(diary)


class Note:
    """Hands the diary on: to nobody, or through a pipe that outlives the child."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd

    def __call__(self, diary: Diary) -> None:
        """Write the diary down."""
        if self._fd is not None:
            os.write(self._fd, pickle.dumps(diary))


@pytest.fixture
def template(quick_path: Path) -> Path:
    """Return a root with the old chain, one of it pinned."""
    path = quick_path / "template"
    with open_root(str(path), QuickOs()) as store:
        store_chain(store, OLD)
        store.pin("prompt", [PINNED])
    return path


class Sweep:
    """Runs the work on a copy of the template, once for each fault."""

    def __init__(self, template: Path) -> None:
        self._template = template
        self._copy = template.with_name("root")

    def calls(self) -> list[Call]:
        """Learn the calls of the work."""
        trace = FaultyOs(QuickOs())
        diary = Diary()
        work(self._fresh(), trace, diary, Note())
        assert diary.published == set(NEW)
        assert diary.gone == len(OLD) + len(NEW) - KEEP_CHUNKS
        return list(trace.calls)

    def fail(self, plan: When | list[When]) -> Diary:
        """Run the work with faults in this process."""
        diary = Diary()
        work(self._fresh(), FaultyOs(QuickOs(), plan), diary, Note())
        self._check(diary)
        return diary

    def kill(self, plan: When) -> Diary:
        """Run the work in a child that is killed; returns the diary as far as it got."""
        path = self._fresh()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            work(path, FaultyOs(QuickOs(), plan), Diary(), Note(writer))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as notes:
            diary = (Diary(), *_unpickled(notes))[-1]
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child was to be killed"
        # The kill may have come after any unlink of the eviction.
        diary.gone = len(OLD) + len(NEW) - KEEP_CHUNKS if diary.evicting else 0
        self._check(diary)
        return diary

    def _fresh(self) -> str:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._template, self._copy)
        return str(self._copy)

    def _check(self, diary: Diary) -> None:
        assert diary.wrong == []
        assert diary.quarantined == 0
        with open_root(str(self._copy), QuickOs()) as store:
            store.reconcile()
            sizes, children = recount(store)
            rows = {row.key: row for row in store.hints.scan(store.namespace)}
            assert {key: row.record.file_bytes for key, row in rows.items()} == sizes
            assert {key: row.refs.children for key, row in rows.items()} == {
                key: children[key] for key in sizes
            }
            lost = (set(OLD) | diary.published) - set(sizes)
            assert len(lost) <= diary.gone, "something published is lost"
            assert {OLD[0], OLD[1]} <= set(sizes), "pinned chunks and their ancestors stay"
            assert (OLD[2] in sizes) or (OLD[3] not in sizes), "no child outlives its parent"
            for key in sizes:
                assert load(store, key) == payload_of(key)
            assert all(o.published for o in store_chain(store, OLD) + store_chain(store, NEW))
            assert [load(store, key) for key in OLD + NEW] == [payload_of(key) for key in OLD + NEW]


def _unpickled(notes: object) -> Iterator[Diary]:
    while True:
        try:
            yield pickle.load(notes)
        except EOFError:
            return


def test_a_store_that_is_killed_at_any_call_leaves_a_sound_root(template: Path) -> None:
    """SIGKILL before each call, and in the middle of each write."""
    sweep = Sweep(template)
    kills = [
        When(number=call.number, fault=fault)
        for call in sweep.calls()
        for fault in faults_of(call.name)
        if isinstance(fault, Kill)
    ]
    for plan in kills:
        sweep.kill(plan)
    assert len(kills) > 100


def test_a_call_that_fails_never_raises_and_leaves_a_sound_root(template: Path) -> None:
    """Every errno of a shared filesystem, short reads, short writes and lost answers."""
    sweep = Sweep(template)
    faults: list[tuple[Call, Fault]] = [
        (call, fault)
        for call in sweep.calls()
        for fault in faults_of(call.name)
        if not isinstance(fault, Kill)
    ]
    for call, fault in faults:
        try:
            sweep.fail(When(number=call.number, fault=fault))
        except BaseException as error:
            error.add_note(f"at {call} with {fault}")
            raise
    assert len(faults) > 600


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_stops_stores_and_nothing_else(template: Path, error: int) -> None:
    """Full from any write on: loads go on, eviction makes room."""
    sweep = Sweep(template)
    for call in sweep.calls():
        if call.name == "write_from":
            sweep.fail(full_disk(call.number, error=error))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES])
def test_a_root_that_goes_away_is_misses_and_skips(template: Path, error: int) -> None:
    """From any call on every call fails: no exception, nothing wrong, nothing lost."""
    sweep = Sweep(template)
    for call in sweep.calls()[::3]:
        sweep.fail(When(number=call.number, fault=Fail(error), forever=True))
