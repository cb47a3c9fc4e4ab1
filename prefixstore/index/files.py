"""Small files and directories around an environment; LMDB's own are never opened here.

Closing any descriptor of a locked file drops the process's POSIX locks on it, so a data file that is in
use is only ever looked at with stat.
"""

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from prefixstore.errors import InvalidError

__all__ = [
    "DAMAGED_NAME",
    "DATA_NAME",
    "data_inode",
    "declare_damaged",
    "make_private",
    "note_in",
    "open_lock_file",
    "try_flock",
    "write_note",
]

DATA_NAME = "data.mdb"
DAMAGED_NAME = "damaged"
"""Its presence beside the environment says: discard it before the next opening."""
NOTE_BYTES_MAX = 256


def make_private(path: Path) -> None:
    """Make a directory for this user alone, or check that an existing one is.

    Raises:
        InvalidError: It is a link, belongs to someone else or can be written by others.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise InvalidError(
            f"{path} must be a directory that only user {os.geteuid()} may write, because a forged "
            f"index can crash its reader; it belongs to user {status.st_uid} with mode "
            f"{stat.filemode(status.st_mode)}: remove it or set another index_dir"
        )


def open_lock_file(path: Path) -> int:
    """Open a file to be flock'd, made if missing; the descriptor closes on exec."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def try_flock(descriptor: int, kind: int) -> bool:
    """Take an flock if that needs no waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def note_in(path: Path) -> str:
    """Return a short note, "" if there is none."""
    try:
        with path.open(encoding="ascii") as file:
            return file.read(NOTE_BYTES_MAX)
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def write_note(path: Path, text: str) -> None:
    """Replace a note; one that is half written by a killed process would cost a probe."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text, encoding="ascii")
    unfinished.replace(path)


def declare_damaged(path: Path) -> None:
    """Leave a file that has the next opening discard the environment."""
    # Where even that fails, the next opening still has its probe.
    with contextlib.suppress(OSError):
        (path / DAMAGED_NAME).touch(mode=0o600)


def data_inode(path: Path) -> int:
    """Return the inode of the data file, 0 if it is gone; opens nothing, which would drop locks."""
    try:
        return (path / DATA_NAME).stat().st_ino
    except OSError:
        return 0
