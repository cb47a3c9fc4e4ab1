"""Where this host keeps the index of a store, and who may share it.

    <index_dir>/<store id>/<boot id>/seat-<k>.lock   flock'd by its users; names their PID namespace
                                     seat-<k>/       held through that lock
                                         opening.lock   one opens, probes or discards at a time
                                         probed         the inode that a probe passed, while in use
                                         closed         inode, size and time at the last clean close
                                         lmdb09/        the environment

* **Boot id.** A file of another boot may be torn by a power cut, because LMDB runs without syncing.
  Directories of other boots are removed unopened.
* **PID namespace.** LMDB knows readers by their pid, so two containers must not share one
  environment. The processes of one PID namespace share a seat; another namespace takes the next one.
  A seat that nobody holds is taken over with what it holds, so a restarted container stays warm.
* **Local.** ``filesystems`` refuses network filesystems before anything is made.
* **Private.** LMDB trusts its file, so directories are 0700 and must belong to this user.

An flock belongs to the open file, so the kernel gives it back however its process dies. Turning an
exclusive flock into a shared one is not atomic: the name in the file is read again afterwards.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, PrefixStoreError, UnavailableError
from prefixstore.index.files import make_private, open_lock_file, try_flock
from prefixstore.index.filesystems import (
    Filesystem,
    check_local,
    filesystem_of,
    nearest_existing,
)

__all__ = ["SEATS_MAX", "Host", "Seat", "claim_seat", "default_index_dir", "this_host"]

SEATS_MAX = 64
"""Containers of one host that use one index directory at a time; the next one runs without."""
OPENING_WAIT_S = 30.0
"""How long to wait for another process that opens: longer than a probe may take."""
OPENING_POLL_S = 0.02
OWNER_BYTES_MAX = 64
CLAIM_POLLS = 50
CLAIM_POLL_S = 0.01
"""How long, and how often, to ask whose a seat is that another process is just taking over."""
STORE_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
BOOT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Only what looks like a boot id is ever removed as another boot's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The facts that decide who may share an environment.

    Attributes:
        boot_id: Changes with each boot of the kernel.
        pid_namespace: The namespace in which this process's pid counts.
    """

    boot_id: str
    pid_namespace: str


def this_host() -> Host:
    """Read the facts from /proc.

    Raises:
        UnavailableError: There is no /proc to read.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pid_namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError as error:
        raise UnavailableError(
            f"the index needs /proc to tell boots and PID namespaces apart: {error}"
        ) from error
    return Host(boot_id=boot_id, pid_namespace=pid_namespace)


def default_index_dir(environ: Mapping[str, str]) -> Path:
    """Choose where indexes live when nobody says: the user's cache directory.

    Raises:
        InvalidError: The environment names no such directory.
    """
    cache, home = Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", ""))
    if cache.is_absolute():
        return cache / "prefixstore" / "index"
    if home.is_absolute():
        return home / ".cache" / "prefixstore" / "index"
    raise InvalidError(
        "no place for the index: set index_dir to a directory on a local filesystem, "
        "or XDG_CACHE_HOME or HOME to an absolute path"
    )


class Seat:
    """The right to use one directory, held by an flock until ``close``.

    Safe for concurrent use; several seats of one process may hold the same directory.

    Attributes:
        path: The directory; it exists.
        number: Which seat it is.
    """

    def __init__(self, path: Path, *, number: int, lock_fd: int) -> None:
        self.path = path
        self.number = number
        self._lock_fd = lock_fd

    @contextlib.contextmanager
    def opening(self, clock: Clock) -> Iterator[None]:
        """Be the only one of this seat's users who opens, probes, discards or closes.

        Raises:
            UnavailableError: Another process has been at it for ``OPENING_WAIT_S``.
        """
        descriptor = open_lock_file(self.path / "opening.lock")
        try:
            deadline_s = clock.monotonic_s() + OPENING_WAIT_S
            while not try_flock(descriptor, fcntl.LOCK_EX):
                if clock.monotonic_s() >= deadline_s:
                    raise UnavailableError(
                        f"another process has been opening the index at {self.path} for "
                        f"{OPENING_WAIT_S:.0f} s; end it, or remove the directory"
                    )
                clock.sleep(OPENING_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go; idempotent. After a fork this leaves the parent's hold alone."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def claim_seat(
    index_dir: str | Path,
    *,
    store_id: str,
    host: Host,
    clock: Clock,
    filesystem: Callable[[Path], Filesystem] = filesystem_of,
) -> Seat:
    """Find the directory of this store, boot and PID namespace, and hold it.

    Args:
        index_dir: Where indexes live; made if missing.
        store_id: The store's id, as in its ``store.json``.
        host: The facts of this host; see ``this_host``.
        clock: Waits for other processes that claim at the same moment.
        filesystem: Tells what an existing path is on.

    Raises:
        InvalidError: The directory is on a network filesystem or belongs to someone else.
        UnavailableError: It cannot be made or written, or every seat is held.
    """
    if not STORE_ID.fullmatch(store_id) or not BOOT_ID.fullmatch(host.boot_id):
        raise InvalidError(f"an index cannot be kept for store {store_id!r}, boot {host.boot_id!r}")
    base = Path(index_dir).absolute()
    boot_dir = base / store_id / host.boot_id
    try:
        check_local(base, filesystem(nearest_existing(base)))
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(boot_dir.parent)
        make_private(boot_dir)
        check_local(boot_dir, filesystem(boot_dir))
        remove_other_boots(boot_dir)
        for number in preferred_seats(boot_dir, owner=host.pid_namespace):
            seat = try_claim(boot_dir, number=number, owner=host.pid_namespace, clock=clock)
            if seat is not None:
                return seat
    except PrefixStoreError:
        raise
    except OSError as error:
        raise UnavailableError(
            f"the index directory {base} cannot be used: {error}; "
            "set index_dir to a directory that this user may write"
        ) from error
    raise UnavailableError(
        f"all {SEATS_MAX} index seats in {boot_dir} are held by other containers; "
        "give some of them another index_dir"
    )


def preferred_seats(boot_dir: Path, *, owner: str) -> list[int]:
    """Return all seat numbers, those that name ``owner`` first: there its siblings or its past are."""
    return sorted(range(SEATS_MAX), key=lambda number: seat_owner(boot_dir, number) != owner)


def seat_owner(boot_dir: Path, number: int) -> str:
    """Return whom a seat's lock file names; "" if it does not exist."""
    try:
        with (boot_dir / f"seat-{number}.lock").open(encoding="ascii") as file:
            return file.read(OWNER_BYTES_MAX)
    except FileNotFoundError:
        return ""


def try_claim(boot_dir: Path, *, number: int, owner: str, clock: Clock) -> Seat | None:
    """Hold seat ``number`` if it is free or this PID namespace's already; else return None."""
    path = boot_dir / f"seat-{number}"
    descriptor = open_lock_file(boot_dir / f"seat-{number}.lock")
    try:
        for _ in range(CLAIM_POLLS):
            if try_flock(descriptor, fcntl.LOCK_EX):
                make_private(path)
                # It said that the users before us had the file probed; they are gone.
                (path / "probed").unlink(missing_ok=True)
                os.pwrite(descriptor, owner.encode(), 0)
                os.ftruncate(descriptor, len(owner.encode()))
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                break
            if try_flock(descriptor, fcntl.LOCK_SH):
                break
            # Someone is between the two locks; soon the file tells who.
            clock.sleep(CLAIM_POLL_S)
        else:
            return None
        if os.pread(descriptor, OWNER_BYTES_MAX, 0) != owner.encode():
            return None
        claimed, descriptor = descriptor, -1
        return Seat(path, number=number, lock_fd=claimed)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def remove_other_boots(boot_dir: Path) -> None:
    """Remove the directories of this store that another boot left, unless someone holds them.

    Nobody can hold one, except where containers are shown a made-up boot id.
    """
    for other in boot_dir.parent.iterdir():
        if other == boot_dir or not BOOT_ID.fullmatch(other.name):
            continue
        with contextlib.ExitStack() as stack:
            free = True
            for lock_path in other.glob("seat-*.lock"):
                descriptor = open_lock_file(lock_path)
                stack.callback(os.close, descriptor)
                free = free and try_flock(descriptor, fcntl.LOCK_EX)
            if free:
                # Another process may be removing it, too.
                shutil.rmtree(other, ignore_errors=True)
