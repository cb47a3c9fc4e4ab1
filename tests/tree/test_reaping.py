"""Reaping where something cannot be read: the rest goes, and what was not seen is looked for again."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.errors import UnavailableError
from prefixstore.testing.faults import Fail, FaultyOs, Kill, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.root import Root
from prefixstore.tree.writers import (
    PRESUMED_DEAD_S,
    UNREAD_MAX,
    Reaped,
    WriterDocument,
    Writers,
    this_process,
)
from tests.tree.trees import KILLED, Fixture, in_child, key_of

DEAD, LIVING = "de" * 16, "ab" * 16


@pytest.fixture
def calls() -> FaultyOs:
    return FaultyOs(QuickOs())


@pytest.fixture
def here(tmp_path: Path, calls: FaultyOs) -> Fixture:
    return Fixture(str(tmp_path / "root"), calls)


def leave(here: Fixture, name: str, *, writer: str = DEAD) -> Path:
    """Leave an unpublished file in the directory of a blob."""
    here.store(key_of(name))
    path = here.file_of(key_of(name)).parent / f".{writer}.1.tmp"
    path.write_bytes(b"x" * 100)
    return path


def announce(here: Fixture, writer: str = DEAD, **changes: object) -> Path:
    """Announce a writer, one that has died on this host unless told otherwise."""
    document = {"pid": 2**22 - 1, "started": "1"} | changes
    mine = {name: getattr(this_process(), name) for name in WriterDocument.__struct_fields__}
    Writers(here.root, this=WriterDocument(**(mine | document))).register(writer)
    return Path(here.root.layout.writer(writer))


def reap(here: Fixture, *, after_s: float = 0.0, thorough: bool = False) -> Reaped:
    return Writers(here.root, this=this_process()).reap(
        server_now_s=time.time() + after_s, spare="0" * 32, thorough=thorough
    )


def hide(*paths: object) -> When:
    """Make directories unreadable."""
    names = {str(path) for path in paths}
    return When(fault=Fail(errno.EIO), name="scan", matches=lambda c: c.path in names, forever=True)


LEVELS: dict[str, Callable[[Path], Path]] = {
    "leaf": lambda leaf: leaf,
    "outer": lambda leaf: leaf.parent,
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_directory_that_cannot_be_read_keeps_its_orphans_only(
    here: Fixture, calls: FaultyOs, level: str
) -> None:
    """The others go; the dead writer stays known until somebody has looked everywhere."""
    hidden, found = leave(here, "a"), leave(here, "b")
    document = announce(here)
    calls.reset(hide(LEVELS[level](hidden.parent)))

    reaped = reap(here)
    assert (reaped.writers, reaped.files, len(reaped.unread)) == ((), 1, 1)
    assert (hidden.exists(), found.exists(), document.exists()) == (True, False, True)

    calls.reset()
    reaped = reap(here)
    assert (reaped.writers, reaped.files, reaped.unread) == ((DEAD,), 1, ())
    assert (hidden.exists(), document.exists()) == (False, False)


def test_a_disk_that_cannot_be_read_is_not_tried_for_hours(here: Fixture, calls: FaultyOs) -> None:
    """Each directory can take as long as a mount takes to fail; what was found until then goes."""
    left = [leave(here, str(number)) for number in range(2 * UNREAD_MAX + 2)]
    left.sort()
    announce(here)
    calls.reset(hide(*(path.parent for path in left[1:])))

    reaped = reap(here)
    assert (reaped.writers, len(reaped.unread)) == ((), UNREAD_MAX + 1)
    leaves = {str(path.parent) for path in left}
    assert sum(call.path in leaves for call in calls.calls) <= UNREAD_MAX + 2


def test_documents_are_reaped_wherever_they_can_be(here: Fixture, calls: FaultyOs) -> None:
    """One directory that cannot be read keeps no other, and no orphan."""
    orphan = leave(here, "a")
    document = announce(here)
    name = f"x.json.{'0' * 32}.tmp"
    layout = here.root.layout
    names = [f"{layout.pins}/{name}", f"{layout.collector}/{name}", f"{layout.writers}/{name}"]
    for path in names:
        Path(path).touch()
    calls.reset(hide(layout.pins))

    reaped = reap(here, after_s=PRESUMED_DEAD_S + 60)
    assert (reaped.writers, reaped.files, len(reaped.unread)) == ((DEAD,), 3, 1)
    assert [Path(path).exists() for path in names] == [True, False, False]
    assert not orphan.exists()
    assert not document.exists()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_writers_document_that_cannot_be_read_is_judged_by_its_age(
    here: Fixture, calls: FaultyOs, error: int
) -> None:
    """It may be another user's; the orphans of others go all the same."""
    orphan = leave(here, "a")
    announce(here)
    other = announce(here, LIVING, host="elsewhere")
    calls.reset(
        When(fault=Fail(error), name="open", matches=lambda c: c.path == str(other), forever=True)
    )

    assert reap(here).writers == (DEAD,)
    assert not orphan.exists()
    assert other.exists()
    assert reap(here, after_s=PRESUMED_DEAD_S + 60).writers == (LIVING,)


def test_a_try_whether_the_root_can_be_written_leaves_nothing(
    here: Fixture, calls: FaultyOs
) -> None:
    """Neither where closing fails, nor, a day after a kill, in the middle of it."""
    tries = Path(here.root.layout.writers)
    calls.reset(When(fault=Fail(errno.EIO), name="close"))
    with pytest.raises(UnavailableError):
        here.root.check_writable()
    assert list(tries.glob("*.probe")) == []

    def die() -> None:
        faulty = FaultyOs(QuickOs(), When(fault=Kill(), name="unlink"))
        Root.open(here.path, os_calls=faulty).check_writable()

    calls.reset()
    assert in_child(die) == KILLED
    assert reap(here, after_s=PRESUMED_DEAD_S - 60).files == 0
    (left,) = tries.glob("*.probe")
    elsewhere = Path(here.root.layout.pins) / left.name
    os.link(left, elsewhere)
    assert reap(here, after_s=PRESUMED_DEAD_S + 60).files == 1
    assert (left.exists(), elsewhere.exists()) == (False, True)
