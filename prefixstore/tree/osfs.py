"""The seam to the operating system: every call on the shared tree goes through an ``Os``.

``RealOs`` is the only code that touches files of a root, so that tests can kill, fail or stop each
call in turn (``prefixstore.testing.faults``), and so that another filesystem client can take its place.
The methods are thin: plain values in and out, paths as strings, errors as ``OSError`` with their errno.
Nothing here retries, interprets an error or keeps state.
"""

import errno
import os
import stat as stat_bits
from typing import NamedTuple, Protocol

__all__ = ["FILE_MODE", "GROUP_FILE_MODE", "Entry", "Os", "RealOs", "Space", "Stat", "write_whole"]

FILE_MODE = 0o644
"""What a writer gives its files, less the umask: readable by every engine, written by its own user."""
GROUP_FILE_MODE = 0o660
"""For roots that the users of one group share; KV holds prompts, so nobody else reads them."""


class Stat(NamedTuple):
    """What the filesystem says of a file.

    Attributes:
        size_bytes: Its length.
        disk_bytes: What it occupies.
        modified_s: When it was modified, by the file server's clock.
        inode: Its number; with ``device``, its identity.
        device: The filesystem it is on.
        is_file: Whether it is a regular file.
        is_directory: Whether it is a directory.
        mode: Its permissions, setuid, setgid and sticky bits included.
    """

    size_bytes: int
    disk_bytes: int
    modified_s: float
    inode: int
    device: int
    is_file: bool
    is_directory: bool
    mode: int


class Entry(NamedTuple):
    """A name in a directory; links and devices are neither file nor directory."""

    name: str
    is_file: bool
    is_directory: bool


class Space(NamedTuple):
    """Room on a filesystem, as an unprivileged writer sees it."""

    total_bytes: int
    free_bytes: int
    free_files: int


class Os(Protocol):
    """Calls on a filesystem; each may raise ``OSError``. Safe for concurrent use."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open a file; returns a descriptor that ``close`` must get back."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor; reports what writing back could not do."""
        ...

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        """Read at ``offset`` into ``target``; returns the bytes read, 0 at the end of the file."""
        ...

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        """Write ``source`` at ``offset``; returns the bytes written, which may be fewer."""
        ...

    def sync_data(self, fd: int) -> None:
        """Put a file's content on the disk, with the metadata needed to read it."""
        ...

    def sync(self, fd: int) -> None:
        """Put a file or a directory on the disk whole."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; fails if that name exists. Atomic."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a name, replacing ``target``. Atomic."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a name."""
        ...

    def stat(self, path: str) -> Stat:
        """Describe what is at ``path``; does not follow a link at its end."""
        ...

    def stat_open(self, fd: int) -> Stat:
        """Describe an open file."""
        ...

    def scan(self, path: str) -> list[Entry]:
        """List a directory, unsorted, without ``.`` and ``..``."""
        ...

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        """Make one directory; fails if it exists."""
        ...

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        ...

    def touch(self, path: str) -> None:
        """Set a file's times to the file server's now; needs write permission only. Follows no link."""
        ...

    def set_mode(self, path: str, mode: int) -> None:
        """Set permissions, whatever the umask says."""
        ...

    def space(self, path: str) -> Space:
        """Tell how much room the filesystem of ``path`` has."""
        ...


class RealOs:
    """The machine's filesystem."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open a file; never follows a link at the end of ``path``, never blocks on a fifo."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        """Read at ``offset`` without the GIL."""
        return os.preadv(fd, [target], offset)

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        """Write at ``offset`` without the GIL."""
        return os.pwrite(fd, source, offset)

    def sync_data(self, fd: int) -> None:
        """Call fdatasync."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """Call fsync."""
        os.fsync(fd)

    def link(self, source: str, target: str) -> None:
        """Call link."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        """Call rename."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Call unlink."""
        os.unlink(path)

    def stat(self, path: str) -> Stat:
        """Call lstat."""
        return _stat(os.lstat(path))

    def stat_open(self, fd: int) -> Stat:
        """Call fstat."""
        return _stat(os.fstat(fd))

    def scan(self, path: str) -> list[Entry]:
        """Read a directory with the kinds that it tells without a stat."""
        with os.scandir(path) as entries:
            return [
                Entry(
                    entry.name,
                    entry.is_file(follow_symlinks=False),
                    entry.is_dir(follow_symlinks=False),
                )
                for entry in entries
            ]

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        """Call mkdir."""
        os.mkdir(path, mode)

    def remove_directory(self, path: str) -> None:
        """Call rmdir."""
        os.rmdir(path)

    def touch(self, path: str) -> None:
        """Call utimensat without times."""
        os.utime(path, follow_symlinks=False)

    def set_mode(self, path: str, mode: int) -> None:
        """Call chmod."""
        os.chmod(path, mode)

    def space(self, path: str) -> Space:
        """Call statvfs."""
        info = os.statvfs(path)
        return Space(
            total_bytes=info.f_frsize * info.f_blocks,
            free_bytes=info.f_frsize * info.f_bavail,
            free_files=info.f_favail,
        )


def write_whole(os_calls: Os, fd: int, source: memoryview) -> None:
    """Write all of ``source`` from the start of a file, however often the system cuts it short.

    A full disk first shows as a short write; the next call then says so.
    """
    done = 0
    while done < len(source):
        count = os_calls.write_from(fd, source[done:], done)
        if count <= 0:
            raise OSError(errno.EIO, f"wrote {count} of {len(source) - done} bytes")
        done += count


def _stat(info: os.stat_result) -> Stat:
    return Stat(
        size_bytes=info.st_size,
        disk_bytes=info.st_blocks * 512,
        modified_s=info.st_mtime,
        inode=info.st_ino,
        device=info.st_dev,
        is_file=stat_bits.S_ISREG(info.st_mode),
        is_directory=stat_bits.S_ISDIR(info.st_mode),
        mode=stat_bits.S_IMODE(info.st_mode),
    )
