"""What a filesystem does with the few calls that a store relies on: each tried, nothing assumed.

Every check works on files of its own in a directory that the caller made and takes away, and returns one
``Finding``. What a filesystem refuses is a finding, not an error.
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from prefixstore.blob.header import ALIGN_BYTES
from prefixstore.clock import Clock
from prefixstore.tree.osfs import Os, write_whole

__all__ = ["CHECKS", "Finding", "Grade", "Scratch", "check_space"]

GRAIN_S = 1.1
"""Between two times that a filesystem must tell apart: some count whole seconds."""
CLOCK_OFF_S = 2.0
"""A server's clock that differs by more is worth a word. Nothing depends on it."""
FREE_SHARE_MIN = 0.05
FREE_FILES_MIN = 100_000
"""Fewer are used up by a day of a busy engine: every chunk is a file."""


class Grade(StrEnum):
    """What a finding means for a store."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    """Works, with less than is usual."""
    PROBLEM = "problem"
    """A store here would not do what it promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        grade: Whether that is good.
        result: What was seen.
        meaning: What follows for a store, and what to do; empty where all is as it should be.
    """

    check: str
    grade: Grade
    result: str
    meaning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """A directory for checks, and how to reach it.

    Attributes:
        path: The directory; empty, and nobody else's.
        calls: The seam.
        clock: The clock of this host.
    """

    path: str
    calls: Os
    clock: Clock

    def create(self, name: str, content: bytes = b"", *, flags: int = 0) -> str:
        """Make a file that is not there; return its path."""
        path = f"{self.path}/{name}"
        fd = self.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
        try:
            write_whole(self.calls, fd, memoryview(content))
        finally:
            self.calls.close(fd)
        return path

    def read(self, path: str, length: int) -> bytes:
        """Read the beginning of a file."""
        fd = self.calls.open(path, os.O_RDONLY)
        try:
            out = memoryview(bytearray(length))
            return bytes(out[: self.calls.read_into(fd, out, 0)])
        finally:
            self.calls.close(fd)


def check_exclusive_create(scratch: Scratch) -> Finding:
    """Create a name twice with O_EXCL: only once may it work."""
    scratch.create("exclusive")
    if _errno_of(lambda: scratch.create("exclusive")) == errno.EEXIST:
        return Finding(check="exclusive create", grade=Grade.OK, result="only the first succeeds")
    return Finding(
        check="exclusive create",
        grade=Grade.PROBLEM,
        result="a name was created twice",
        meaning="two writers could write one file. Do not share this filesystem between hosts.",
    )


def check_link(scratch: Scratch) -> Finding:
    """Give two files one name by links: the second must be refused, the first is the file itself."""
    one, other = scratch.create("link-one", b"1"), scratch.create("link-other", b"2")
    target = f"{scratch.path}/link-target"
    refused = _errno_of(lambda: scratch.calls.link(one, target))
    if refused:
        return Finding(
            check="hard links",
            grade=Grade.WARNING,
            result=f"refused ({errno.errorcode.get(refused, refused)})",
            meaning="blobs are published by rename instead: when two hosts store one chunk at the same "
            "moment, the second replaces the first with equal bytes. The collector's lease can be "
            "held twice for a moment. Neither harms.",
        )
    again = _errno_of(lambda: scratch.calls.link(other, target))
    is_same = scratch.calls.stat(one).inode == scratch.calls.stat(target).inode
    if again == errno.EEXIST and is_same and scratch.read(target, 2) == b"1":
        return Finding(check="hard links", grade=Grade.OK, result="put a name only where none is")
    return Finding(
        check="hard links",
        grade=Grade.PROBLEM,
        result="a link replaced a name, or is another file",
        meaning="a published chunk could be replaced while it is read. Do not use this filesystem.",
    )


def check_rename(scratch: Scratch) -> Finding:
    """Rename a file over another: the name must stand for the new one, whole."""
    old, new = scratch.create("rename-old", b"old"), scratch.create("rename-new", b"new")
    scratch.calls.rename(new, old)
    gone = _errno_of(lambda: scratch.calls.stat(new)) == errno.ENOENT
    if gone and scratch.read(old, 4) == b"new":
        return Finding(check="rename", grade=Grade.OK, result="replaces a name")
    return Finding(
        check="rename",
        grade=Grade.PROBLEM,
        result="the old file is still there, or the new one is",
        meaning="pins could not be replaced, nor torn files be mended. Do not use this filesystem.",
    )


def check_direct_io(scratch: Scratch) -> Finding:
    """Write and read pages past the page cache, at the offset at which payloads begin."""
    page = memoryview(mmap.mmap(-1, 2 * ALIGN_BYTES))
    page[:] = bytes(range(256)) * (len(page) // 256)
    back = memoryview(mmap.mmap(-1, ALIGN_BYTES))

    def try_it() -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT
        fd = scratch.calls.open(f"{scratch.path}/direct", flags)
        try:
            write_whole(scratch.calls, fd, page)
            scratch.calls.read_into(fd, back, ALIGN_BYTES)
        finally:
            scratch.calls.close(fd)

    refused = _errno_of(try_it)
    if refused:
        return Finding(
            check="direct I/O",
            grade=Grade.NOTE,
            result=f"refused ({errno.errorcode.get(refused, refused)})",
            meaning="blobs pass through the page cache, which costs a copy and memory.",
        )
    if back != page[ALIGN_BYTES:]:
        return Finding(
            check="direct I/O",
            grade=Grade.PROBLEM,
            result="reads other bytes than were written",
            meaning="set direct_io to off, and do not trust this filesystem.",
        )
    return Finding(check="direct I/O", grade=Grade.OK, result="works")


def check_times(scratch: Scratch) -> Finding:
    """Touch a file: its time must move, and tells how far the server's clock is from this one's."""
    path = scratch.create("times")
    first_s = scratch.calls.stat(path).modified_s
    scratch.clock.sleep(GRAIN_S)
    before_s = scratch.clock.wall_s()
    refused = _errno_of(lambda: scratch.calls.touch(path))
    after_s = scratch.clock.wall_s()
    second_s = scratch.calls.stat(path).modified_s
    if refused or second_s <= first_s:
        why = errno.errorcode.get(refused, f"{refused}") if refused else "the time stays"
        return Finding(
            check="times",
            grade=Grade.WARNING,
            result=f"a touch does not work ({why})",
            meaning="chunks that are used again look as old as when they were stored: eviction takes "
            "them in the order of storing.",
        )
    offset_s = second_s - (before_s + after_s) / 2
    result = f"a touch works; the server's clock is {offset_s:+.1f} s from this host's"
    if abs(offset_s) <= CLOCK_OFF_S:
        return Finding(check="times", grade=Grade.OK, result=result)
    return Finding(
        check="times",
        grade=Grade.NOTE,
        result=result,
        meaning="times of files are compared with each other only, so this does no harm; the end of a "
        "pin goes by the server's clock.",
    )


def check_unlink_in_use(scratch: Scratch) -> Finding:
    """Unlink a file that is open: a reader should still get its bytes, and no name should stay."""
    path = scratch.create("in-use", b"bytes")
    fd = scratch.calls.open(path, os.O_RDONLY)
    try:
        scratch.calls.unlink(path)
        left = [entry.name for entry in scratch.calls.scan(scratch.path) if "nfs" in entry.name]
        out = memoryview(bytearray(5))
        refused = _errno_of(lambda: scratch.calls.read_into(fd, out, 0))
    finally:
        with contextlib.suppress(OSError):
            scratch.calls.close(fd)
    if refused or bytes(out) != b"bytes":
        return Finding(
            check="unlink in use",
            grade=Grade.NOTE,
            result="a reader loses the file",
            meaning="a chunk that is evicted while it is read is a miss.",
        )
    if left:
        return Finding(
            check="unlink in use",
            grade=Grade.NOTE,
            result=f"the file stays as {left[0]} until it is closed",
            meaning="room is free again when the reader has ended (NFS's silly rename).",
        )
    return Finding(check="unlink in use", grade=Grade.OK, result="a reader keeps the file")


def check_space(path: str, calls: Os) -> Finding:
    """Look at the room for bytes and for files."""
    space = calls.space(path)
    free_share = space.free_bytes / space.total_bytes if space.total_bytes else 0.0
    gib = 2**30
    result = f"{space.free_bytes / gib:.1f} GiB of {space.total_bytes / gib:.1f} GiB free"
    # Some filesystems make inodes as they are needed, and say 0 or a number beyond counting.
    is_counted = 0 < space.free_files < 2**40
    if is_counted:
        result += f", {space.free_files} files"
    if free_share < FREE_SHARE_MIN:
        return Finding(
            check="room",
            grade=Grade.WARNING,
            result=result,
            meaning="stores will soon be skipped: free some, or set min_free_bytes and max_bytes so that "
            "the store makes room by itself.",
        )
    if is_counted and space.free_files < FREE_FILES_MIN:
        return Finding(
            check="room",
            grade=Grade.WARNING,
            result=result,
            meaning="every chunk is a file: use larger blocks, or a filesystem with more inodes.",
        )
    return Finding(check="room", grade=Grade.OK, result=result)


CHECKS: dict[str, Callable[[Scratch], Finding]] = {
    "exclusive create": check_exclusive_create,
    "hard links": check_link,
    "rename": check_rename,
    "unlink in use": check_unlink_in_use,
    "direct I/O": check_direct_io,
    "times": check_times,
}
"""By name, in the order in which they are shown."""


def _errno_of(call: Callable[[], object]) -> int:
    """Return the number of the error that a call ends with, 0 for none."""
    try:
        call()
    except OSError as error:
        return error.errno or errno.EIO
    return 0
