"""Who writes under a root, and what the dead have left behind.

Each writer has an id of its own, a directory ``tmp/<id>`` for what it has not published, and a file
``writers/<id>.json`` that says where it runs. Temporary files are orphans once their writer is dead. Dead
is proved on the writer's own host only: another boot, no such process in its PID namespace, or the
process id now belongs to another. A writer of another host is presumed dead when neither its file nor its
directory changed for a day by the file server's clock; a live one refreshes its file every hour.

A wrong guess costs a writer one store, which it tries again with the next request: an unlinked temporary
file is never half published.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.tree.documents import put_document, read_document
from prefixstore.tree.paths import is_writer
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["WriterDocument", "Writers", "this_process"]

REFRESH_S = 3600.0
"""How often a live writer says so: one metadata write an hour."""
PRESUMED_DEAD_S = 86400.0
"""A writer of another host that was silent for so long is dead, or its network is; in both cases its
unfinished files are of no use. Longer keeps more orphans, by 16 buffers a crash at most."""


class WriterDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``writers/<id>.json``: where a writer runs."""

    host: str
    boot_id: str
    pid: int
    pid_namespace: str
    started: str
    """The process's start time in clock ticks since boot: tells a reused pid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """What a reaping removed: writers' ids and temporary files."""

    writers: tuple[str, ...]
    files: int


def this_process() -> WriterDocument:
    """Describe the calling process."""
    return WriterDocument(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid=os.getpid(),
        pid_namespace=_pid_namespace(),
        started=_start_of(os.getpid()) or "",
    )


class Writers:
    """The writers of one root. Safe for concurrent use."""

    def __init__(self, root: Root, *, this: WriterDocument) -> None:
        self._root = root
        self._os = root.os_calls
        self._this = this

    def register(self, writer: str) -> None:
        """Announce a writer before its first temporary file.

        Raises:
            FullError, UnavailableError: It cannot be written.
        """
        put_document(self._root.layout.writer(writer), self._this, os_calls=self._os)

    def refresh(self, writer: str) -> None:
        """Say that a writer lives; a file that is gone is written again."""
        try:
            self._os.touch(self._root.layout.writer(writer))
        except OSError:
            with contextlib.suppress(PrefixStoreError):
                self.register(writer)

    def leave(self, writer: str) -> None:
        """Remove a writer's directory and file at its orderly end."""
        self._remove(writer)

    def known(self) -> dict[str, WriterDocument | None]:
        """Return all writers with their documents; None for one whose document is missing or bad."""
        layout = self._root.layout
        files = self._names(layout.writers, directories=False)
        names = {name.removesuffix(".json") for name in files if name.endswith(".json")}
        names |= set(self._names(layout.tmp, directories=True))
        found: dict[str, WriterDocument | None] = {}
        for name in sorted(filter(is_writer, names)):
            try:
                path = self._root.layout.writer(name)
                found[name] = read_document(path, WriterDocument, os_calls=self._os)
            except InvalidError:
                found[name] = None
        return found

    def reap(self, *, server_now_s: float, spare: str) -> Reaped:
        """Remove the files of dead writers.

        Args:
            server_now_s: Now by the file server's clock: the time of a file just written there.
            spare: The caller's own id.
        """
        dead: list[str] = []
        files = 0
        for writer, document in self.known().items():
            if writer != spare and self._is_dead(writer, document, server_now_s=server_now_s):
                files += self._remove(writer)
                dead.append(writer)
        return Reaped(writers=tuple(dead), files=files)

    def _is_dead(
        self, writer: str, document: WriterDocument | None, *, server_now_s: float
    ) -> bool:
        here = self._this
        if document is not None and document.host == here.host:
            if document.boot_id == here.boot_id:
                if document.pid_namespace == here.pid_namespace:
                    return _start_of(document.pid) != document.started
            elif document.boot_id and here.boot_id:
                # The same host name with another boot: either it restarted, or two hosts share the
                # name. Silence has to tell them apart.
                return self._silent_s(writer, server_now_s) > 2 * REFRESH_S
        return self._silent_s(writer, server_now_s) > PRESUMED_DEAD_S

    def _silent_s(self, writer: str, server_now_s: float) -> float:
        latest = 0.0
        layout = self._root.layout
        for path in (layout.writer(writer), layout.temporary(writer)):
            with contextlib.suppress(OSError):
                latest = max(latest, self._os.stat(path).modified_s)
        return server_now_s - latest

    def _remove(self, writer: str) -> int:
        """Remove a writer's temporary files, its directory and its document; returns the files."""
        directory = self._root.layout.temporary(writer)
        files = 0
        if writer in self._names(self._root.layout.tmp, directories=True):
            for name in self._names(directory, directories=False):
                with contextlib.suppress(OSError):
                    self._os.unlink(f"{directory}/{name}")
                    files += 1
        with contextlib.suppress(OSError):
            self._os.remove_directory(directory)
        with contextlib.suppress(OSError):
            self._os.unlink(self._root.layout.writer(writer))
        return files

    def _names(self, path: str, *, directories: bool) -> list[str]:
        """Return the names of directories, or of files; a link that leads elsewhere is neither."""
        try:
            entries = self._os.scan(path)
        except OSError as error:
            if is_missing(error):
                return []
            raise translate(error, doing="list", path=path) from error
        return [e.name for e in entries if (e.is_directory if directories else e.is_file)]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return a process's start time as the kernel counts it, None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; the start time is field 22, the 20th after it.
    return stat.rpartition(")")[2].split()[19]
