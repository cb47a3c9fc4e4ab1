"""Two hosts that make one directory: a filesystem that contradicts itself for a moment is asked again."""

import errno
import os
from pathlib import Path

import pytest

from prefixstore.errors import UnavailableError
from prefixstore.testing.faults import Call, Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from tests.tree.trees import Fixture, key_of, payload_of

ROUNDS = 10
RACED = key_of("raced")


class Moments:
    """The first calls of a name meet a fault, by their count."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        # The look for a blob that is there opens files, too; and only the inner directory is raced for.
        self.suffix = ".tmp" if name == "open" else f"/{RACED.hex()[2:4]}"
        self.left = count

    def __call__(self, call: Call) -> bool:
        """Whether a call is one of the first."""
        is_one = call.name == self.name and call.path.endswith(self.suffix)
        if not is_one or not self.left:
            return False
        self.left -= 1
        return True


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("name", ["open", "make_directory"])
def test_a_directory_that_is_there_and_not_there_is_waited_out(
    quick_path: Path, name: str, number: int
) -> None:
    """The store ends well once the other host's directory is there for all to see."""
    calls = FaultyOs(QuickOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls)
    calls.reset(When(fault=Fail(number), matches=Moments(name, ROUNDS)))
    assert not here.store(RACED).existed
    assert here.load(RACED) == payload_of(RACED)
    assert here.temporaries() == []


def test_a_directory_that_never_comes_ends_the_store(quick_path: Path) -> None:
    """In a bounded number of calls."""
    calls = FaultyOs(QuickOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls)
    calls.reset(
        When(
            fault=Fail(errno.ENOENT),
            matches=lambda call: call.name == "open" and call.path.endswith(".tmp"),
            forever=True,
        )
    )
    with pytest.raises(UnavailableError):
        here.store(key_of("never"))
    assert len(calls.calls) < 150


def test_a_namespace_that_is_gone_is_not_asked_again(quick_path: Path) -> None:
    """A mount that is away fails a store at once, and nothing is made in its place."""
    calls = FaultyOs(QuickOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls)
    away = quick_path / "away"
    Path(here.path).rename(away)
    calls.reset()
    with pytest.raises(UnavailableError):
        here.store(key_of("away"))
    assert len(calls.calls) < 8
    assert not Path(here.path).exists()


class GroupOs(QuickOs):
    """Refuses to write where permissions say so, to whoever runs the tests, too."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """See ``Os.open``."""
        if flags & os.O_CREAT:
            self._check(path)
        return super().open(path, flags, mode)

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        """See ``Os.make_directory``."""
        self._check(path)
        super().make_directory(path, mode)

    def _check(self, path: str) -> None:
        directory = path.rpartition("/")[0]
        if Path(directory).exists() and not self.stat(directory).mode & 0o200:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_group_never_keeps_a_directory_that_it_cannot_write(quick_path: Path, nth: int) -> None:
    """A maker that fails or dies before it gave a directory its mode leaves it to the next store, its own, too."""
    calls = FaultyOs(GroupOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls, options={"group_shared": True})
    calls.reset(When(fault=Fail(errno.EIO), name="set_mode", nth=nth))
    with pytest.raises(UnavailableError):
        here.store(RACED)
    assert not here.store(RACED).existed
    leaf = here.file_of(RACED).parent
    modes = [path.stat().st_mode & 0o7777 for path in (leaf, leaf.parent)]
    assert modes == [0o2770, 0o2770]


def test_a_directory_that_was_taken_for_unfinished_is_made_again(quick_path: Path) -> None:
    """Another host's store has removed it, or made it anew, before its maker gave it its mode."""
    calls = FaultyOs(GroupOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls, options={"group_shared": True})
    for error in (errno.ENOENT, errno.EPERM):
        key = key_of(str(error))
        calls.reset(When(fault=Fail(error), name="set_mode", nth=1))
        assert not here.store(key).existed
        assert here.load(key) == payload_of(key)


def test_a_directory_that_may_not_be_written_is_left_alone(quick_path: Path) -> None:
    """One that holds anything was finished once: somebody wants it so."""
    calls = FaultyOs(GroupOs())
    here = Fixture(str(quick_path / "root"), os_calls=calls, options={"group_shared": True})
    here.store(RACED)
    leaf = here.file_of(RACED).parent
    leaf.chmod(0o2550)
    beside = key_of("beside")
    beside = type(beside)(RACED[:2] + beside[2:])
    calls.reset()
    with pytest.raises(UnavailableError, match="EACCES"):
        here.store(beside)
    assert leaf.stat().st_mode & 0o7777 == 0o2550
    assert len(calls.calls) < 10
