"""Small JSON files under a root: written whole or not at all, read with a limit.

A document appears under its name by a link of a complete temporary file (or a rename, where links are
missing), so that a reader on any host sees all of it or nothing.
"""

import contextlib
import errno
import os
import re
import uuid
from typing import TypeVar

import msgspec

from prefixstore.config import DOCUMENT_BYTES_MAX
from prefixstore.errors import InvalidError
from prefixstore.tree.osfs import Os, write_whole
from prefixstore.tree.trouble import is_absence, is_missing, lacks_links, translate

__all__ = [
    "ensure_directory",
    "is_temporary_document",
    "put_document",
    "put_name",
    "read_document",
    "replace_document",
]

T = TypeVar("T")

_TEMPORARY = re.compile(r"[A-Za-z0-9._-]+\.json\.[0-9a-f]{32}\.tmp")

ATTEMPTS = 3
"""To read a document that other hosts replace; nobody replaces one that often."""


def is_temporary_document(name: str) -> bool:
    """Whether a file's name is that of a document being written, or left behind half written."""
    return _TEMPORARY.fullmatch(name) is not None


def read_document(path: str, kind: type[T], *, os_calls: Os) -> T | None:
    """Read and validate a document; None if there is none.

    Raises:
        InvalidError: It is too long, not JSON, or not of this kind.
        UnavailableError: It cannot be read now.
    """
    content = _read_current(path, os_calls=os_calls)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidError(
            f"{path} is not a valid {kind.__name__} ({error}); restore it from a copy, or remove it "
            "if you know that nothing needs it"
        ) from error


def put_document(path: str, document: msgspec.Struct, *, os_calls: Os, mode: int | None) -> None:
    """Write a document unless one is there already: then leave that one alone. Durable on return.

    Args:
        path: Its name.
        document: What it says.
        os_calls: The seam.
        mode: Its permissions, past the umask; None leaves them to the umask.

    Raises:
        InvalidError: It is longer than any reader accepts.
        FullError, UnavailableError: It cannot be written.
    """
    _write(path, document, os_calls=os_calls, mode=mode, replace=False)


def replace_document(
    path: str, document: msgspec.Struct, *, os_calls: Os, mode: int | None
) -> None:
    """Write a document in the place of any that is there; else as ``put_document``.

    Raises:
        InvalidError: It is longer than any reader accepts; the one that is there stays.
        FullError, UnavailableError: It cannot be written.
    """
    _write(path, document, os_calls=os_calls, mode=mode, replace=True)


def ensure_directory(path: str, *, os_calls: Os, mode: int | None = None) -> None:
    """Make a directory and its parents, whatever other process makes them, too.

    Args:
        path: The directory.
        os_calls: The seam.
        mode: Permissions for each directory made, past the umask; None leaves them to the umask.

    Raises:
        OSError: As the filesystem says, but not because it exists.
    """
    try:
        os_calls.make_directory(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        if not parent or parent == path:
            raise
        ensure_directory(parent, os_calls=os_calls, mode=mode)
        with contextlib.suppress(FileExistsError):
            os_calls.make_directory(path)
    if mode is not None:
        os_calls.set_mode(path, mode)


def _read_current(path: str, *, os_calls: Os) -> bytes | None:
    """Read a document; None only if its name is not there.

    On shared filesystems, a document that another host replaces can vanish between its opening and its
    reading, as ENOENT or ESTALE. Taken for missing, a replaced pin would keep nothing: look again.
    """
    for attempt in range(ATTEMPTS):
        try:
            fd = os_calls.open(path, os.O_RDONLY)
        except OSError as error:
            if is_missing(error):
                return None
            failure = error
        else:
            try:
                return _read(fd, path, os_calls=os_calls)
            except OSError as error:
                failure = error
        if not is_absence(failure) or attempt + 1 == ATTEMPTS:
            raise translate(failure, doing="read", path=path) from failure
    raise AssertionError("the last attempt returned or raised")


def _read(fd: int, path: str, *, os_calls: Os) -> bytes:
    try:
        size = os_calls.stat_open(fd).size_bytes
        if size > DOCUMENT_BYTES_MAX:
            raise InvalidError(
                f"{path} has {size} bytes, at most {DOCUMENT_BYTES_MAX} are read: not ours, or damaged"
            )
        content = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = os_calls.read_into(fd, content[done:], done)
            if not count:
                # Documents never shrink: the client's idea of the file is stale.
                raise OSError(errno.EIO, f"read {done} of {size} bytes")
            done += count
        return bytes(content)
    finally:
        with contextlib.suppress(OSError):  # Nothing was written: closing can lose nothing.
            os_calls.close(fd)


def _write(
    path: str, document: msgspec.Struct, *, os_calls: Os, mode: int | None, replace: bool
) -> None:
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    content = memoryview(msgspec.json.format(msgspec.json.encode(document), indent=2))
    if len(content) > DOCUMENT_BYTES_MAX:
        raise InvalidError(
            f"{path} would have {len(content)} bytes, at most {DOCUMENT_BYTES_MAX} are read: "
            "divide what it holds"
        )
    try:
        fd = os_calls.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_whole(os_calls, fd, content)
            os_calls.sync_data(fd)
            made = os_calls.stat_open(fd).mode
        finally:
            os_calls.close(fd)
        # A mount without permissions of its own shows the same for all files, and may refuse to set them.
        if mode is not None and made != mode:
            os_calls.set_mode(temporary, mode)
        if replace:
            os_calls.rename(temporary, path)
        else:
            put_name(temporary, path, os_calls=os_calls)
    except OSError as error:
        raise translate(error, doing="write", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            os_calls.unlink(temporary)


def put_name(temporary: str, path: str, *, os_calls: Os) -> None:
    """Give a file its name unless another has it; its first name may stay.

    Raises:
        OSError: As the filesystem says, but not because the name exists.
    """
    try:
        os_calls.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        if not lacks_links(error):
            raise
        # Without links, two first writers may replace each other's document; whoever reads it back
        # then finds the one that stayed.
        try:
            os_calls.stat(path)
        except FileNotFoundError:
            os_calls.rename(temporary, path)
