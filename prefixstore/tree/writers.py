"""Who writes under a root, and what the dead have left behind.

Each writer has an id of its own, which begins the names of what it has not published, and a file
``writers/<id>.json`` that says where it runs. Temporary files are orphans once their writer is dead. Dead
is proved on the writer's own host only: no such process in its PID namespace, or the process id now
belongs to another. A writer of another host or boot is presumed dead when neither its file nor any of its
temporary files changed for hours or a day by the file server's clock; a live one refreshes its file every
hour.

A wrong guess costs a writer one store, which it tries again with the next request: an unlinked temporary
file is never half published.

Looking for orphans lists every directory of blobs, so it is done only when the file of a dead writer says
that there may be some; a writer that ends in order takes its file along. A few directories that cannot be
read are passed over, and the file of the dead writer stays until somebody has read them all.

Documents are written to temporary files, too, and who tries whether a root can be written makes one. Those
name no writer, and go when they are a day old.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prefixstore.errors import PrefixStoreError
from prefixstore.tree.documents import is_temporary_document, put_document, read_document
from prefixstore.tree.paths import is_probe, is_writer
from prefixstore.tree.root import Root
from prefixstore.tree.scan import names_in, scan_temporaries
from prefixstore.tree.trouble import is_missing

__all__ = ["Reaped", "WriterDocument", "Writers", "is_alive", "this_process"]

REFRESH_S = 3600.0
"""How often a live writer says so: one metadata write an hour."""
PRESUMED_DEAD_S = 86400.0
"""A writer of another host that was silent for so long is dead, or its network is; in both cases its
unfinished files are of no use. Longer keeps more orphans, by 16 buffers a crash at most."""
UNREAD_MAX = 16
"""Directories to pass over: as many as a scan for an eviction hides. Each can take as long as a mount takes to
fail, and a host that cannot read more of them reads nothing."""


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
    """What a reaping removed, or would remove.

    Attributes:
        writers: Ids of dead writers that have left nothing.
        files: How many temporary files.
        unread: Sentences on the directories that could not be read; what they hold is left.
    """

    writers: tuple[str, ...]
    files: int
    unread: tuple[str, ...] = ()


def this_process() -> WriterDocument:
    """Describe the calling process."""
    return WriterDocument(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid=os.getpid(),
        pid_namespace=_pid_namespace(),
        started=_start_of(os.getpid()) or "",
    )


def is_alive(document: WriterDocument, *, here: WriterDocument) -> bool | None:
    """Whether a process lives that described itself; None where that cannot be proved from here."""
    mine = (here.host, here.boot_id, here.pid_namespace)
    if not all(mine) or mine != (document.host, document.boot_id, document.pid_namespace):
        return None
    return _is_running(document.pid, document.started)


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
        put_document(
            self._root.layout.writer(writer),
            self._this,
            os_calls=self._os,
            mode=self._root.document_mode,
        )

    def refresh(self, writer: str) -> None:
        """Say that a writer lives; a file that is gone is written again."""
        try:
            self._os.touch(self._root.layout.writer(writer))
        except OSError:
            with contextlib.suppress(PrefixStoreError):
                self.register(writer)

    def leave(self, writer: str) -> None:
        """Remove a writer's file at its orderly end; what it could not clean up is left to others."""
        self._remove(self._root.layout.writer(writer))

    def known(self) -> dict[str, WriterDocument | None]:
        """Return the announced writers with their documents; None for one that cannot be read or understood.

        Raises:
            UnavailableError: They cannot be listed.
        """
        layout = self._root.layout
        files = names_in(self._os, layout.writers, directories=False)
        names = (name.removesuffix(".json") for name in files if name.endswith(".json"))
        found: dict[str, WriterDocument | None] = {}
        for name in sorted(filter(is_writer, names)):
            try:
                found[name] = read_document(layout.writer(name), WriterDocument, os_calls=self._os)
            except PrefixStoreError:
                found[name] = None
        return found

    def reap(
        self,
        *,
        server_now_s: float,
        spare: str,
        thorough: bool = False,
        dry_run: bool = False,
    ) -> Reaped:
        """Remove the files of dead writers.

        Args:
            server_now_s: Now by the file server's clock: the time of a file just written there.
            spare: The caller's own id.
            thorough: Look for orphans even if no writer is known to have died: for those whose
                writer left no file, or whose removal failed.
            dry_run: Only tell what would be removed.

        Raises:
            UnavailableError: The namespaces or the writers cannot be listed.
        """
        layout = self._root.layout
        remove = _spare if dry_run else self._remove
        files, unread = self._reap_documents(server_now_s=server_now_s, remove=remove)
        known = self.known()
        suspects = {
            writer
            for writer, document in known.items()
            if writer != spare
            and self._is_dead(document, [layout.writer(writer)], server_now_s=server_now_s)
        }
        orphans, hidden = self._temporaries() if suspects or thorough else ({}, [])
        dead: list[str] = []
        for writer in sorted({*suspects, *orphans} - {spare}):
            paths = orphans.get(writer, [])
            signs = [layout.writer(writer), *paths]
            if self._is_dead(known.get(writer), signs, server_now_s=server_now_s):
                files += sum(map(remove, paths))
                if not hidden:
                    remove(layout.writer(writer))
                    dead.append(writer)
        return Reaped(writers=tuple(dead), files=files, unread=(*hidden, *unread))

    def _temporaries(self) -> tuple[dict[str, list[str]], list[str]]:
        """Return the unpublished files of all namespaces by their writer, and what hides others of them."""
        found: dict[str, list[str]] = {}
        hidden: list[str] = []

        def pass_over(error: PrefixStoreError) -> None:
            hidden.append(str(error))
            if len(hidden) > UNREAD_MAX:
                raise error

        try:
            for namespace in self._root.namespaces():
                for writer, path in scan_temporaries(
                    self._os, self._root.layout, namespace, pass_over=pass_over
                ):
                    found.setdefault(writer, []).append(path)
        except PrefixStoreError as error:
            if not hidden:
                hidden.append(str(error))
        return found, hidden

    def _reap_documents(
        self, *, server_now_s: float, remove: Callable[[str], bool]
    ) -> tuple[int, list[str]]:
        """Remove old temporary documents and tries; return how many, and what could not be read."""
        layout = self._root.layout
        directories = [layout.root, layout.writers, layout.pins, layout.collector, layout.history]
        directories.append(layout.scrub)
        directories += [layout.namespace(namespace) for namespace in self._root.namespaces()]
        files = 0
        unread: list[str] = []
        for directory in directories:
            try:
                names = names_in(self._os, directory, directories=False)
            except PrefixStoreError as error:
                unread.append(str(error))
                continue
            for name in names:
                path = f"{directory}/{name}"
                is_try = directory == layout.writers and is_probe(name)
                if not (is_try or is_temporary_document(name)):
                    continue
                if server_now_s - self._last_seen_s([path]) > PRESUMED_DEAD_S:
                    files += remove(path)
        return files, unread

    def _is_dead(
        self, document: WriterDocument | None, signs: list[str], *, server_now_s: float
    ) -> bool:
        """Judge a writer by its document and by when its files last changed."""
        here = self._this
        patience_s = PRESUMED_DEAD_S
        if document is not None and document.host == here.host:
            if document.boot_id == here.boot_id:
                if document.pid_namespace == here.pid_namespace != "":
                    is_running = _is_running(document.pid, document.started)
                    if is_running is not None:
                        return not is_running
            elif document.boot_id and here.boot_id:
                # The same host name with another boot: either it restarted, or two hosts share the
                # name. Silence has to tell them apart.
                patience_s = 2 * REFRESH_S
        return server_now_s - self._last_seen_s(signs) > patience_s

    def _last_seen_s(self, paths: list[str]) -> float:
        """Return when the latest of some files changed, by the file server's clock.

        What cannot be looked at counts as new, and what is gone does not count.
        """
        latest_s = 0.0
        for path in paths:
            try:
                latest_s = max(latest_s, self._os.stat(path).modified_s)
            except OSError as error:
                if not is_missing(error):
                    return float("inf")
        return latest_s

    def _remove(self, path: str) -> bool:
        """Unlink a file; return whether this did it. A failure leaves it to the next reaping."""
        try:
            self._os.unlink(path)
        except OSError:
            return False
        return True


def _spare(_path: str) -> bool:
    """Stand in for a removal that is only told of."""
    return True


def _is_running(pid: int, started: str) -> bool | None:
    """Whether a process is the one that started then; None if the system does not tell.

    A /proc that is mounted with hidepid shows a user no process of another.
    """
    found = _start_of(pid)
    if found is not None and started:
        return found == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    return None


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
