"""Two hosts that make one directory: a filesystem that contradicts itself for a moment is asked again."""

import errno
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
