"""From a seat to an open environment: probe, discard, open; and the note of a clean close.

A damaged LMDB file kills the process that reads it, so a child process reads it first. That costs
some 0.1 s and is skipped when nothing can have changed:

    the data file is as the last clean close left it (inode, size, times), or
    the seat is in use and the first of its users had this very file probed.

Everything here runs under the seat's opening lock: one process of the seat at a time.
"""

import contextlib
from pathlib import Path

from prefixstore.clock import Clock
from prefixstore.errors import UnavailableError
from prefixstore.index import sharing
from prefixstore.index.environment import FORMAT_NAME, Environment
from prefixstore.index.files import DAMAGED_NAME, DATA_NAME, note_in, write_note
from prefixstore.index.place import Seat
from prefixstore.index.probe import Verdict, probe

__all__ = ["close_in", "discard", "open_in"]

FILE_NAMES = (DATA_NAME, "lock.mdb", DAMAGED_NAME)
PROBED_NAME = "probed"
CLOSED_NAME = "closed"


def open_in(
    seat: Seat, *, map_bytes: int, map_bytes_max: int, discard_first: bool, clock: Clock
) -> Environment:
    """Open the environment of ``seat``; one that is damaged is discarded and started anew.

    An environment that this process has open already is shared as it is.

    Raises:
        UnavailableError: It cannot be opened now.
    """
    path = seat.path / FORMAT_NAME

    def acquire() -> Environment:
        return sharing.acquire(path, map_bytes=map_bytes, map_bytes_max=map_bytes_max, clock=clock)

    with seat.opening(clock):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            if not sharing.is_open(path) and (discard_first or not fit_to_open(seat.path, path)):
                discard(path)
            try:
                opened = acquire()
            except UnavailableError:
                if not (path / DAMAGED_NAME).exists():
                    raise
                discard(path)
                opened = acquire()
            write_note(seat.path / PROBED_NAME, str(identity(path)[0]))
        except OSError as error:
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError(
                f"the index directory {path} cannot be used: {error}; "
                "set index_dir to a directory that this user may write"
            ) from error
    return opened


def close_in(seat: Seat, opened: Environment, *, clock: Clock) -> None:
    """Give back the environment and the seat; the last user of this process notes a clean close.

    If others still write, the note no longer fits the file, and a probe follows.
    """
    path = seat.path / FORMAT_NAME
    sharing.release(opened)
    # Without the note the next opening probes.
    with contextlib.suppress(OSError):
        if opened.unusable is None and not sharing.is_open(path):
            with seat.opening(clock):
                write_note(seat.path / CLOSED_NAME, " ".join(map(str, identity(path))))
    seat.close()


def fit_to_open(seat_path: Path, path: Path) -> bool:
    """Say whether this process may open the data file: absent, unchanged since, or probed."""
    if (path / DAMAGED_NAME).exists():
        return False
    found = identity(path)
    if found == ABSENT:
        return True
    if note_in(seat_path / CLOSED_NAME) == " ".join(map(str, found)):
        return True
    if note_in(seat_path / PROBED_NAME) == str(found[0]):
        return True
    return probe(path) is Verdict.FIT


ABSENT = (0, 0, 0, 0)


def identity(path: Path) -> tuple[int, int, int, int]:
    """Return inode, size and times of the data file, zeros if there is none; does not open it."""
    try:
        status = (path / DATA_NAME).stat()
    except FileNotFoundError:
        return ABSENT
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def discard(path: Path) -> None:
    """Remove the files of an environment; whoever still has them open keeps them to himself."""
    for name in FILE_NAMES:
        (path / name).unlink(missing_ok=True)
