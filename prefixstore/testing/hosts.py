"""Hosts that share a filesystem, in one process: clients that cache, clocks that differ, processes that die.

A ``HostOs`` is how one host sees the server. Like an NFS client it believes for ``cache_s`` what it has seen
once: attributes, listings, and that a name is not there. What it does itself it sees at once, and an open
asks the server (close-to-open). Names that it changes, or tries to, it forgets. All files are dated by the
server's clock.

``die_after`` ends a host's process in the middle of whatever it does: ``ProcessDiedError`` is raised at the
call and at every later one, so that no handler can do any more on the disk than a killed process could.
"""

import errno
import fcntl
import os
import posixpath
from dataclasses import dataclass, field

from prefixstore.testing.clock import ManualClock
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.osfs import Entry, Stat

__all__ = ["HostOs", "ProcessDiedError", "Server"]


class ProcessDiedError(BaseException):
    """The process is gone; not an ``Exception``, so that nothing takes it for an error to handle."""


@dataclass
class Server:
    """What the hosts share.

    Attributes:
        clock: The server's clock.
    """

    clock: ManualClock = field(default_factory=ManualClock)

    def now_s(self) -> float:
        """Return the server's time."""
        return self.clock.wall_s()


class HostOs(QuickOs):
    """One host's view of the server. For one thread.

    Attributes:
        cache_s: How long it believes what it has seen.
    """

    def __init__(self, server: Server, *, cache_s: float) -> None:
        self.cache_s = cache_s
        self._server = server
        self._calls_left: int | None = None
        self._stats: dict[str, tuple[float, Stat]] = {}
        self._missing: dict[str, float] = {}
        self._lists: dict[str, tuple[float, list[Entry]]] = {}
        self._paths: dict[int, str] = {}

    def die_after(self, calls: int | None) -> None:
        """Let the process die at the call after the next ``calls``; None starts a new process."""
        self._calls_left = calls
        if calls is None:
            for fd in list(self._paths):
                self._paths.pop(fd)
                super().close(fd)

    # Calls that look.

    def stat(self, path: str) -> Stat:
        """Look, or remember a look of a moment ago."""
        self._begin(path)
        if self._is_fresh(*self._stats.get(path, (float("-inf"), None))[:1]):
            return self._stats[path][1]
        try:
            found = super().stat(path)
        except OSError as error:
            self._note_missing(path, error)
            raise
        self._stats[path] = (self._server.now_s(), found)
        return found

    def scan(self, path: str) -> list[Entry]:
        """List, or remember a listing of a moment ago."""
        self._begin(path)
        if self._is_fresh(*self._lists.get(path, (float("-inf"), None))[:1]):
            return list(self._lists[path][1])
        try:
            entries = super().scan(path)
        except OSError as error:
            self._note_missing(path, error)
            raise
        self._lists[path] = (self._server.now_s(), entries)
        return list(entries)

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Ask the server, unless the name is remembered to be missing."""
        creates = bool(flags & os.O_CREAT)
        self._begin(path, changes=creates)
        self._stats.pop(path, None)
        try:
            fd = super().open(path, flags, mode)
        except OSError as error:
            self._note_missing(path, error)
            raise
        self._paths[fd] = path
        return fd

    # Calls that change.

    def close(self, fd: int) -> None:
        """Close; what was written is dated by the server."""
        self._live()
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.utime(fd, (self._server.now_s(),) * 2)
        path = self._paths.pop(fd, None)
        if path is not None:
            self._stats.pop(path, None)
        super().close(fd)

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        """Write, if the process lives."""
        self._live()
        return super().write_from(fd, source, offset)

    def touch(self, path: str) -> None:
        """Set the server's time."""
        self._begin(path, changes=True)
        os.utime(path, (self._server.now_s(),) * 2, follow_symlinks=False)

    def link(self, source: str, target: str) -> None:
        """Link; the server decides whether the name is free."""
        self._begin(source, changes=True)
        self._begin(target, changes=True)
        super().link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Rename."""
        self._begin(source, changes=True)
        self._begin(target, changes=True)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        self._begin(path, changes=True)
        super().unlink(path)

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        """Make a directory; the server decides whether it is there."""
        self._begin(path, changes=True)
        super().make_directory(path, mode)

    def remove_directory(self, path: str) -> None:
        """Remove a directory."""
        self._begin(path, changes=True)
        super().remove_directory(path)

    # Inside.

    def _live(self) -> None:
        if self._calls_left is not None:
            if self._calls_left <= 0:
                raise ProcessDiedError
            self._calls_left -= 1

    def _begin(self, path: str, *, changes: bool = False) -> None:
        """Fail if a name on the way is remembered to be missing; forget the last one if it changes."""
        self._live()
        if changes:
            self._stats.pop(path, None)
            self._missing.pop(path, None)
            self._lists.pop(posixpath.dirname(path), None)
        at = path
        while at not in ("", "/"):
            if self._is_fresh(self._missing.get(at, float("-inf"))):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            at = posixpath.dirname(at)

    def _note_missing(self, path: str, error: OSError) -> None:
        """Remember the first name on the way that is not there."""
        if error.errno == errno.ENOENT:
            while not os.path.lexists(posixpath.dirname(path)):
                path = posixpath.dirname(path)
            self._missing[path] = self._server.now_s()

    def _is_fresh(self, seen_s: float) -> bool:
        return self._server.now_s() - seen_s < self.cache_s
