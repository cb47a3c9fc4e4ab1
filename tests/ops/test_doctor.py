"""The doctor: finds what a filesystem does, says what follows, and leaves nothing behind."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.clock import SystemClock
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.ops.checks import Grade
from prefixstore.ops.doctor import Diagnosis, diagnose, recommend
from prefixstore.ops.timings import Bandwidth, Latency
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.osfs import Os, Space, Stat
from prefixstore.tree.root import Root

SIZE_BYTES = 4 * 2**20


class Clock(SystemClock):
    """Real time whose sleeps the filesystem under test needs not: its times are fine."""

    def sleep(self, duration_s: float) -> None:
        """Wait just long enough for a file's time to move."""
        super().sleep(min(duration_s, 0.02))


def examine(path: Path, calls: Os | None = None, *, size_bytes: int = 0) -> Diagnosis:
    """Run the doctor on a directory."""
    return diagnose(str(path), os_calls=calls or QuickOs(), clock=Clock(), size_bytes=size_bytes)


def grades(found: Diagnosis) -> dict[str, Grade]:
    """Return the grade of each check."""
    return {finding.check: finding.grade for finding in found.findings}


def refusing(name: str, number: int, *, path: str = "") -> FaultyOs:
    """Return a filesystem that refuses one kind of call, below paths that end so."""
    fault = When(
        fault=Fail(number), name=name, matches=lambda call: call.path.endswith(path), forever=True
    )
    return FaultyOs(QuickOs(), fault)


def test_a_sound_filesystem_is_fit(tmp_path: Path) -> None:
    """All checks are made and timed, and the directory is as it was."""
    (tmp_path / "mine").write_text("stays")
    found = examine(tmp_path, size_bytes=SIZE_BYTES)

    assert found.fit
    assert {
        "room",
        "exclusive create",
        "hard links",
        "rename",
        "unlink in use",
        "direct I/O",
        "times",
    } == set(grades(found))
    assert all(timed.calls > 1 and timed.median_s > 0 for timed in found.latencies)
    assert found.bandwidths[0].moved_bytes == SIZE_BYTES
    assert (found.is_root, found.errors) == (False, ())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_hard_links_a_store_works_with_less(tmp_path: Path) -> None:
    """It says what is lost, and is fit all the same."""
    found = examine(tmp_path, refusing("link", errno.EPERM))
    assert (grades(found)["hard links"], found.fit) == (Grade.WARNING, True)


def test_without_direct_io_it_is_recommended_off(tmp_path: Path) -> None:
    """Reading is then not measured: it would measure memory."""
    calls = refusing("open", errno.EINVAL, path="/direct")
    found = examine(tmp_path, calls, size_bytes=SIZE_BYTES)
    assert (grades(found)["direct I/O"], found.settings["direct_io"]) == (Grade.NOTE, "off")
    assert [(moved.operation, moved.cached) for moved in found.bandwidths] == [("write", True)]


def test_a_touch_that_is_refused_is_told(tmp_path: Path) -> None:
    """Recency suffers, nothing else."""
    found = examine(tmp_path, refusing("touch", errno.EPERM, path="/times"))
    assert (grades(found)["times"], found.fit) == (Grade.WARNING, True)


class Overwriting(QuickOs):
    """Grants an exclusive creation to everybody."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Ignore O_EXCL."""
        return super().open(path, flags & ~os.O_EXCL, mode)


class Relinking(QuickOs):
    """Links over names that exist."""

    def link(self, source: str, target: str) -> None:
        """Replace what is there."""
        Path(target).unlink(missing_ok=True)
        super().link(source, target)


class Copying(QuickOs):
    """Renames by leaving a copy behind."""

    def rename(self, source: str, target: str) -> None:
        """Copy."""
        Path(target).write_bytes(Path(source).read_bytes())


class Corrupting(QuickOs):
    """Reads other bytes at other offsets."""

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        """Bring the beginning of the file, wherever it was asked to read."""
        return super().read_into(fd, target, 0) if offset == 0 else self._wrong(target)

    def _wrong(self, target: memoryview) -> int:
        target[:] = bytes(len(target))
        return len(target)


@pytest.mark.parametrize(
    ("calls", "check"),
    [
        (Overwriting, "exclusive create"),
        (Relinking, "hard links"),
        (Copying, "rename"),
        (Corrupting, "direct I/O"),
    ],
)
def test_a_filesystem_that_breaks_what_a_store_needs_is_not_fit(
    tmp_path: Path, calls: Callable[[], Os], check: str
) -> None:
    """The very check that it breaks is the problem."""
    found = examine(tmp_path, calls())
    problems = [name for name, grade in grades(found).items() if grade is Grade.PROBLEM]
    assert (problems, found.fit) == ([check], False)
    assert list(tmp_path.iterdir()) == []


class DaysOff(QuickOs):
    """A server whose clock is two days ahead."""

    def stat(self, path: str) -> Stat:
        """Tell a time of its own."""
        found = super().stat(path)
        return found._replace(modified_s=found.modified_s + 2 * 86400)


def test_a_servers_clock_that_is_days_off_is_told_and_harmless(tmp_path: Path) -> None:
    """A note with the offset; the store goes by the server's time alone."""
    found = examine(tmp_path, DaysOff())
    (times,) = [finding for finding in found.findings if finding.check == "times"]
    assert (times.grade, found.fit) == (Grade.NOTE, True)
    assert "+172800" in times.result


class Small(QuickOs):
    """A filesystem that is almost full, in one way or the other."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def space(self, path: str) -> Space:
        """Tell what the test has set."""
        return self._space


@pytest.mark.parametrize(
    ("space", "grade"),
    [
        (Space(total_bytes=10**12, free_bytes=10**10, free_files=10**7), Grade.WARNING),
        (Space(total_bytes=10**12, free_bytes=10**11, free_files=10**4), Grade.WARNING),
        (Space(total_bytes=10**12, free_bytes=10**11, free_files=0), Grade.OK),
        (Space(total_bytes=0, free_bytes=0, free_files=0), Grade.WARNING),
    ],
)
def test_room_for_bytes_and_files(tmp_path: Path, space: Space, grade: Grade) -> None:
    """Both run out; 0 files means that nobody counts them."""
    assert grades(examine(tmp_path, Small(space)))["room"] is grade


def test_a_read_only_filesystem_is_told(tmp_path: Path) -> None:
    """Nothing can be tried, and the error says what to set."""
    found = examine(tmp_path, refusing("make_directory", errno.EROFS))
    assert not found.fit
    assert "read_only" in found.errors[0]


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(InvalidError, match="make it"):
        examine(tmp_path / "none")


@pytest.mark.crash
def test_any_call_may_fail_and_nothing_stays(tmp_path: Path) -> None:
    """Whatever the doctor meets, it comes to an end and takes its files away."""
    trace = FaultyOs(QuickOs())
    examine(tmp_path, trace)
    # Of the repeated calls that are timed, the first few of each name are enough.
    tried = [call for call in trace.calls if call.nth <= 12]
    for call in tried:
        calls = FaultyOs(QuickOs(), When(fault=Fail(errno.EIO), number=call.number))
        with contextlib.suppress(UnavailableError):
            examine(tmp_path, calls)
        assert list(tmp_path.iterdir()) == [], call


def test_what_cannot_be_taken_away_is_named(tmp_path: Path) -> None:
    """An error says which directory is left."""
    found = examine(tmp_path, refusing("remove_directory", errno.EIO))
    (left,) = tmp_path.iterdir()
    assert str(left) in found.errors[0]
    left.rmdir()


def test_settings_follow_from_what_was_measured() -> None:
    """Slow calls and a slow link have their settings, fast ones keep the defaults."""
    slow = [
        Latency(operation="look for a missing file", calls=9, median_s=0.004, slowest_s=1),
        Latency(operation="touch", calls=9, median_s=0.02, slowest_s=1),
    ]
    link = Bandwidth(operation="read", bytes_per_s=1e8, moved_bytes=1, cached=False)
    fast = Bandwidth(operation="read", bytes_per_s=5e9, moved_bytes=1, cached=False)

    settings, reasons = recommend([], slow, [fast, link], total_bytes=10 * 2**30)
    assert settings == {
        "codec": "auto",
        "miss_ttl_s": 5.0,
        "touch_interval_s": 3600.0,
        "min_free_bytes": 512 * 2**20,
    }
    assert set(reasons) == set(settings)
    assert recommend([], [], [fast], total_bytes=0) == ({}, {})


def test_it_may_be_run_on_a_root_in_use(tmp_path: Path) -> None:
    """It reads and writes nothing that is the store's."""
    root = tmp_path / "root"
    Root.create(str(root))
    calls = FaultyOs(QuickOs())
    found = examine(root, calls)
    assert found.is_root
    outside = [
        c for c in calls.calls if ".prefixstore-doctor-" not in c.path and c.path != str(root)
    ]
    assert outside == []
