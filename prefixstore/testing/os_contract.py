"""What every ``Os`` must do for a store to be right on it, as tests that an implementation inherits.

Two of them, ``a`` and ``b``, are two hosts on one filesystem; they may be one and the same. Subclass
``OsContract`` with fixtures ``a``, ``b``, ``directory`` (a new directory on it, by the name that both know) and,
where hosts see each other late, ``late_s``.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixstore.tree.osfs import FILE_MODE, GROUP_FILE_MODE, Entry, Os, write_whole

__all__ = ["OsContract", "read_file", "write_file"]

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
RACES = 40
SAME_TIME_S = 30


def write_file(calls: Os, path: str, content: bytes) -> None:
    """Make a file, as a writer does."""
    fd = calls.open(path, CREATE, FILE_MODE)
    try:
        write_whole(calls, fd, memoryview(content))
    finally:
        calls.close(fd)


def read_file(calls: Os, path: str, length: int = 4096) -> bytes:
    """Read up to ``length`` bytes of a file."""
    fd = calls.open(path, os.O_RDONLY)
    try:
        target = bytearray(length)
        count = calls.read_into(fd, memoryview(target), 0)
        return bytes(target[:count])
    finally:
        calls.close(fd)


@contextlib.contextmanager
def raising(number: int) -> Iterator[None]:
    """Expect an ``OSError`` of this number."""
    with pytest.raises(OSError, match=r".*") as caught:
        yield
    assert caught.value.errno == number, caught.value


class OsContract:
    """The contract; see the module."""

    @pytest.fixture
    def late_s(self) -> float:
        """Return how long one host may believe what it has seen."""
        return 0.0

    def test_what_is_written_is_read(self, a: Os, directory: str) -> None:
        """At any offset; 0 bytes at the end."""
        write_file(a, f"{directory}/file", bytes(range(100)))
        fd = a.open(f"{directory}/file", os.O_RDONLY)
        target = memoryview(bytearray(50))
        counts = [a.read_into(fd, target, 90), a.read_into(fd, target[10:], 100)]
        assert (counts, bytes(target[:10])) == ([10, 0], bytes(range(90, 100)))
        assert (a.stat_open(fd).size_bytes, a.stat_open(fd).is_file) == (100, True)
        a.close(fd)

    def test_a_large_file_is_whole(self, a: Os, directory: str) -> None:
        """However many calls it takes."""
        content = os.urandom(3 * 2**20 + 4096)
        write_file(a, f"{directory}/file", content)
        assert read_large(a, f"{directory}/file", len(content)) == content

    def test_what_is_missing(self, a: Os, directory: str) -> None:
        """Every call says ENOENT of a name that is not there."""
        path = f"{directory}/none"
        calls: list[Callable[[], object]] = [
            lambda: a.stat(path),
            lambda: a.open(path, os.O_RDONLY),
            lambda: a.unlink(path),
            lambda: a.scan(path),
            lambda: a.touch(path),
            lambda: a.link(path, f"{directory}/other"),
            lambda: a.rename(path, f"{directory}/other"),
            lambda: a.open(f"{path}/file", CREATE, FILE_MODE),
        ]
        for call in calls:
            with raising(errno.ENOENT):
                call()
        assert a.scan(directory) == []

    def test_an_exclusive_file_is_made_once(self, a: Os, b: Os, directory: str) -> None:
        """By whichever host."""
        write_file(a, f"{directory}/file", b"first")
        for host in (a, b):
            with raising(errno.EEXIST):
                host.open(f"{directory}/file", CREATE, FILE_MODE)
        assert read_file(b, f"{directory}/file") == b"first"

    def test_a_link_puts_a_name_only_where_none_is(self, a: Os, b: Os, directory: str) -> None:
        """Put-if-absent: the first stays, and its bytes."""
        write_file(a, f"{directory}/one", b"one")
        write_file(b, f"{directory}/two", b"two")
        a.link(f"{directory}/one", f"{directory}/name")
        with raising(errno.EEXIST):
            b.link(f"{directory}/two", f"{directory}/name")
        assert read_file(b, f"{directory}/name") == b"one"
        assert a.stat(f"{directory}/one").inode == a.stat(f"{directory}/name").inode

    def test_of_hosts_that_race_one_wins(self, a: Os, b: Os, directory: str) -> None:
        """Each name is linked by exactly one of two, time and again."""
        for name, host in (("one", a), ("two", b)):
            write_file(host, f"{directory}/{name}", name.encode())
        line = threading.Barrier(2)

        def race(name: str, host: Os) -> list[bool]:
            won = []
            for at in range(RACES):
                line.wait(30)
                try:
                    host.link(f"{directory}/{name}", f"{directory}/name{at}")
                    won.append(True)
                except FileExistsError:
                    won.append(False)
            return won

        with ThreadPoolExecutor(2) as pool:
            by_one, by_two = pool.map(race, ("one", "two"), (a, b))
        assert [one + two for one, two in zip(by_one, by_two, strict=True)] == [1] * RACES
        winners = [b"one" if one else b"two" for one in by_one]
        assert [read_file(a, f"{directory}/name{at}") for at in range(RACES)] == winners

    def test_a_rename_replaces(self, a: Os, directory: str) -> None:
        """The name has the new bytes; the old name is gone."""
        write_file(a, f"{directory}/old", b"old")
        write_file(a, f"{directory}/new", b"new")
        a.rename(f"{directory}/new", f"{directory}/old")
        assert read_file(a, f"{directory}/old") == b"new"
        assert [entry.name for entry in a.scan(directory)] == ["old"]

    def test_a_file_that_goes_under_a_reader(self, a: Os, b: Os, directory: str) -> None:
        """It is read whole, or the error is one that means absent; the name is gone."""
        path = f"{directory}/file"
        write_file(a, path, b"content")
        fd = b.open(path, os.O_RDONLY)
        a.unlink(path)
        target = bytearray(7)
        try:
            b.read_into(fd, memoryview(target), 0)
            said = None
        except OSError as error:
            said = error.errno
        with contextlib.suppress(OSError):
            b.close(fd)
        assert said in (errno.ENOENT, errno.ESTALE) or bytes(target) == b"content", said
        with raising(errno.ENOENT):
            a.stat(path)

    def test_what_one_host_closed_the_other_opens(
        self, a: Os, b: Os, directory: str, late_s: float
    ) -> None:
        """Whole, also where it was looked for in vain before, once that is forgotten."""
        path = f"{directory}/file"
        with raising(errno.ENOENT):
            b.stat(path)
        write_file(a, path, b"content")
        deadline_s = time.monotonic() + late_s + 5
        while True:
            try:
                assert read_file(b, path) == b"content"
            except FileNotFoundError:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            else:
                break

    def test_a_listing(self, a: Os, directory: str) -> None:
        """Names and kinds, without the directory itself and its parent; of many entries, too."""
        a.make_directory(f"{directory}/sub")
        write_file(a, f"{directory}/file", b"")
        expected = [Entry("file", True, False), Entry("sub", False, True)]
        assert sorted(a.scan(directory)) == expected
        for at in range(300):
            write_file(a, f"{directory}/sub/{at:03}", b"")
        names = [entry.name for entry in a.scan(f"{directory}/sub")]
        assert sorted(names) == [f"{at:03}" for at in range(300)]

    def test_directories(self, a: Os, directory: str) -> None:
        """One that exists is not made again; one that is not empty is not removed."""
        a.make_directory(f"{directory}/sub")
        with raising(errno.EEXIST):
            a.make_directory(f"{directory}/sub")
        write_file(a, f"{directory}/sub/file", b"")
        with pytest.raises(OSError, match=r".*") as caught:
            a.remove_directory(f"{directory}/sub")
        assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
        a.unlink(f"{directory}/sub/file")
        a.remove_directory(f"{directory}/sub")
        assert a.scan(directory) == []
        found = a.stat(directory)
        assert (found.is_directory, found.is_file) == (True, False)

    def test_a_touch_dates_by_the_server(self, a: Os, b: Os, directory: str) -> None:
        """As young as what is touched by another host a moment later."""
        write_file(a, f"{directory}/one", b"1")
        write_file(a, f"{directory}/two", b"2")
        a.touch(f"{directory}/one")
        b.touch(f"{directory}/two")
        one, two = (a.stat(f"{directory}/{name}").modified_s for name in ("one", "two"))
        assert abs(one - two) < SAME_TIME_S

    def test_what_a_file_is(self, a: Os, directory: str) -> None:
        """Length, kind, permissions, and something of it on the disk once that is synced."""
        write_file(a, f"{directory}/file", bytes(10000))
        fd = a.open(f"{directory}/file", os.O_WRONLY)
        a.sync_data(fd)
        a.sync(fd)
        a.close(fd)
        a.set_mode(f"{directory}/file", GROUP_FILE_MODE)
        found = a.stat(f"{directory}/file")
        assert (found.size_bytes, found.is_file, found.is_directory) == (10000, True, False)
        assert found.mode == GROUP_FILE_MODE
        assert found.disk_bytes > 0

    def test_room(self, a: Os, directory: str) -> None:
        """Free bytes are no more than all."""
        room = a.space(directory)
        assert 0 < room.free_bytes <= room.total_bytes


def read_large(calls: Os, path: str, length: int) -> bytes:
    """Read ``length`` bytes, and see that no more come."""
    fd = calls.open(path, os.O_RDONLY)
    target = bytearray(length + 1)
    done = 0
    while count := calls.read_into(fd, memoryview(target)[done:], done):
        done += count
    calls.close(fd)
    return bytes(target[:done])
