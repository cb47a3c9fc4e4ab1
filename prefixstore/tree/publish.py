"""How a file gets its final name on a shared tree: whole, once, and never over a sound one.

What a reader sees when the writer dies after each step:

    1 open tmp/<writer>/<n> exclusively     nothing; an orphan, reaped later
    2 write header, payload, padding        nothing
    3 fdatasync, if the policy says so      nothing
    4 close: NFS reports lost writes here   nothing
    5 link it to its final name             the whole blob; also an orphan name for the same file
    6 unlink the temporary name             the whole blob
    7 fsync the directory, if so            as 6, and a power cut keeps it

Step 5 puts the name only where none is: the first writer of a key wins, later ones leave it alone. A
power cut after 5 without 3 may leave the name on an empty or short file: its length tells, a load calls
it torn, and the next store of the key replaces it.
"""

import contextlib
import errno
import itertools
import os
from typing import TypeAlias

from prefixstore.config import Durability
from prefixstore.tree.osfs import FILE_MODE, GROUP_FILE_MODE, write_whole
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import lacks_links

__all__ = ["Publisher"]

Identity: TypeAlias = tuple[int, int]
"""Device and inode."""

ATTEMPTS = 3
"""To name a file: once for a directory that is not there yet, once for links that are not, and once."""


class Publisher:
    """Publishes files for one writer. Safe for concurrent use by threads."""

    def __init__(
        self, root: Root, *, temporary: str, durability: Durability, direct_io: bool
    ) -> None:
        self._root = root
        self._os = root.os_calls
        self._temporary = temporary
        self._durability = durability
        self._direct_io = direct_io
        self._counter = itertools.count()
        self._has_links = True

    def publish(self, path: str, image: memoryview, *, replace: bool) -> bool:
        """Write a file image and give it its name.

        Args:
            path: The final name.
            image: The whole file.
            replace: A torn file has the name: take its place.

        Returns:
            False if a blob was there first.

        Raises:
            OSError: Nothing was published, as far as can be told.
        """
        temporary = f"{self._temporary}/{next(self._counter)}"
        try:
            fd = self._create(temporary)
            try:
                write_whole(self._os, fd, image)
                if self._durability is not Durability.NONE:
                    self._os.sync_data(fd)
                identity = self._identity(fd, length=len(image))
            finally:
                self._os.close(fd)
            if self._root.group_shared:
                self._os.set_mode(temporary, GROUP_FILE_MODE)
            published = self._publish(temporary, path, identity=identity, replace=replace)
        finally:
            # Also the name that a link left behind, and that a rename took away.
            with contextlib.suppress(OSError):
                self._os.unlink(temporary)
        if self._durability is Durability.FULL:
            self._sync_directory(path.rpartition("/")[0])
        return published

    def _create(self, temporary: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if self._direct_io else 0)
        try:
            return self._os.open(temporary, flags, FILE_MODE)
        except FileNotFoundError:
            self._root.ensure_directory(self._temporary)
            return self._os.open(temporary, flags, FILE_MODE)

    def _identity(self, fd: int, *, length: int) -> Identity:
        """Return what tells this file from any other, after a look at its length."""
        found = self._os.stat_open(fd)
        if found.size_bytes != length:
            raise OSError(errno.EIO, f"{found.size_bytes} bytes on disk after writing {length}")
        return found.device, found.inode

    def _publish(self, temporary: str, path: str, *, identity: Identity, replace: bool) -> bool:
        """Give a complete file its name, unless a sound blob has it. Returns whether it did.

        A server that did what it was asked and lost its answer is asked again, and reports that the
        name exists, or is gone, or something else. So look who has the name before believing an error.
        """
        for attempt in range(ATTEMPTS):
            is_last = attempt + 1 == ATTEMPTS
            try:
                return self._name(temporary, path, replace=replace)
            except FileExistsError:
                return self._is_ours(path, identity)
            except FileNotFoundError:
                if self._is_ours(path, identity):
                    return True
                if is_last:
                    raise
                self._make_directory(path.rpartition("/")[0])
            except OSError as error:
                if self._is_ours(path, identity):
                    return True
                if is_last or not (self._has_links and lacks_links(error)):
                    raise
                self._has_links = False
        raise AssertionError("the last attempt returned or raised")

    def _make_directory(self, path: str) -> None:
        self._root.ensure_directory(path)
        if self._durability is Durability.FULL:
            outer = path.rpartition("/")[0]
            self._sync_directory(outer)
            self._sync_directory(outer.rpartition("/")[0])

    def _name(self, temporary: str, path: str, *, replace: bool) -> bool:
        if self._has_links and not replace:
            self._os.link(temporary, path)
            return True
        if not replace and self._is_there(path):
            return False
        self._os.rename(temporary, path)
        return True

    def _is_there(self, path: str) -> bool:
        try:
            self._os.stat(path)
        except OSError:
            return False
        return True

    def _is_ours(self, path: str, identity: Identity) -> bool:
        """Whether the published file is the one written here: a request failed by its success."""
        try:
            found = self._os.stat(path)
        except OSError:
            return False
        return (found.device, found.inode) == identity

    def _sync_directory(self, path: str) -> None:
        fd = self._os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._os.sync(fd)
        finally:
            self._os.close(fd)
