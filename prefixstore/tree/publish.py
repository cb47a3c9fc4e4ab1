"""How a blob gets its name on a shared tree: whole, once, and never over a sound one.

What a reader sees when the writer dies after each step:

    1 open .<writer>.<n>.tmp exclusively    nothing; an orphan, reaped later
    2 write header, payload, padding        nothing
    3 fdatasync, if the policy says so      nothing
    4 close: NFS reports lost writes here   nothing
    5 link it to <key>.kv beside it         the whole blob; also an orphan name for the same file
    6 unlink the temporary name             the whole blob
    7 fsync the directories, if so          as 6, and a power cut keeps it

Step 5 puts the name only where none is: the first writer of a key wins, later ones leave it alone. A
power cut after 5 without 3 may leave the name on an empty or short file: its length tells, a load calls
it torn, and the next store of the key replaces it.

Only <aa> and <bb> are ever made here, one level at a time. If the namespace's directory is not there, the
mount is gone or the namespace was removed, and a store must fail rather than fill the disk below the
mount point.

In a root of a group a directory takes two calls, one to make it and one to let the group write there. Until
the second nobody can write there, its maker neither, so that it is empty if its maker dies between them:
whoever is refused there removes an empty directory and makes it again.
"""

import contextlib
import errno
import itertools
import os
from typing import TypeAlias

from prefixstore.config import Durability
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.direct import DirectIo
from prefixstore.tree.osfs import FILE_MODE, GROUP_FILE_MODE, write_whole
from prefixstore.tree.root import GROUP_DIRECTORY_MODE, Root
from prefixstore.tree.trouble import is_absence, lacks_links

__all__ = ["Publisher"]

Identity: TypeAlias = tuple[int, int]
"""Device and inode."""

CREATE_ATTEMPTS = 32
"""To create a file: once for directories that are not there yet, once for a name that a forked process
has taken, and once; more only while another host makes the same directory, which takes it some round
trips to the server. Too few skip a store."""
NAME_ATTEMPTS = 3
"""To name a file: once for links that the filesystem does not have, and once."""
UNFINISHED_DIRECTORY_MODE = 0o555
"""Of a group's directory that is being made: scans and loads may pass, and nobody may write."""


class Publisher:
    """Publishes blobs for one writer. Safe for concurrent use by threads."""

    def __init__(
        self, root: Root, *, writer: str, durability: Durability, direct: DirectIo
    ) -> None:
        self._root = root
        self._os = root.os_calls
        self._writer = writer
        self._durability = durability
        self._direct = direct
        self._counter = itertools.count()
        self._has_links = True
        self._durable_leaves: set[str] = set()

    def publish(
        self, namespace: NamespaceId, key: Key, image: memoryview, *, replace: bool
    ) -> bool:
        """Write a blob's file image and give it its name.

        Args:
            namespace: Where it belongs.
            key: Its key.
            image: The whole file, page-aligned.
            replace: Something that is no sound blob has the name: take its place.

        Returns:
            False if a blob was there first.

        Raises:
            OSError: Nothing was published, as far as can be told.
        """
        path = self._root.layout.blob(namespace, key)
        flag = self._direct.flag
        temporary, fd = self._create(namespace, key, flag)
        try:
            identity = self._write(fd, image)
            if self._root.group_shared:
                self._os.set_mode(temporary, GROUP_FILE_MODE)
            published = self._publish(temporary, path, identity=identity, replace=replace)
        except OSError as error:
            if not self._direct.refused(error, flag=flag):
                raise
            return self.publish(namespace, key, image, replace=replace)
        finally:
            # Also the name that a link left behind, and that a rename took away.
            with contextlib.suppress(OSError):
                self._os.unlink(temporary)
        if self._durability is Durability.FULL:
            self._sync_names(path)
        return published

    def _create(self, namespace: NamespaceId, key: Key, flag: int) -> tuple[str, int]:
        """Open a file that nobody else has; return its path and descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for attempt in range(CREATE_ATTEMPTS):
            temporary = self._root.layout.temporary(
                namespace, key, writer=self._writer, number=next(self._counter)
            )
            try:
                return temporary, self._os.open(temporary, flags | flag, FILE_MODE)
            except FileExistsError:
                # A forked process has inherited this writer's id and counter.
                if attempt + 1 == CREATE_ATTEMPTS:
                    raise
            except OSError as error:
                leaf = temporary.rpartition("/")[0]
                is_last = attempt + 1 == CREATE_ATTEMPTS
                if not is_last and (is_absence(error) or self._removes_unfinished(leaf, error)):
                    self._make_leaf(leaf)
                elif self._direct.refused(error, flag=flag):
                    flag = 0
                else:
                    raise
        raise AssertionError("the last attempt returned or raised")

    def _write(self, fd: int, image: memoryview) -> Identity:
        """Write and close a file; return what tells it from any other."""
        try:
            write_whole(self._os, fd, image)
            if self._durability is not Durability.NONE:
                self._os.sync_data(fd)
            found = self._os.stat_open(fd)
            if found.size_bytes != len(image):
                wrong = f"{found.size_bytes} bytes on disk after writing {len(image)}"
                raise OSError(errno.EIO, wrong)
        finally:
            self._os.close(fd)
        return found.device, found.inode

    def _publish(self, temporary: str, path: str, *, identity: Identity, replace: bool) -> bool:
        """Give a complete file its name, unless a blob has it. Returns whether it did.

        A server that did what it was asked and lost its answer is asked again, and reports that the
        name exists, or is gone, or something else. So look who has the name before believing an error.
        """
        for attempt in range(NAME_ATTEMPTS):
            is_last = attempt + 1 == NAME_ATTEMPTS
            try:
                return self._name(temporary, path, replace=replace)
            except FileExistsError:
                return self._is_ours(path, identity)
            except OSError as error:
                if self._is_ours(path, identity):
                    return True
                if is_last or not (self._has_links and lacks_links(error)):
                    raise
                self._has_links = False
        raise AssertionError("the last attempt returned or raised")

    def _name(self, temporary: str, path: str, *, replace: bool) -> bool:
        if self._has_links and not replace:
            self._os.link(temporary, path)
            return True
        if not replace and self._is_there(path):
            return False
        self._os.rename(temporary, path)
        return True

    def _make_leaf(self, path: str) -> None:
        """Make the directory of a blob, and the one above it if need be.

        While two hosts make one directory, GlusterFS may tell either that it exists and that it is
        missing, or stale, for some milliseconds: then a few more tries find it there.
        """
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self._make_directory(path)
            except OSError as error:
                outer = path.rpartition("/")[0]
                is_last = attempt + 1 == CREATE_ATTEMPTS
                if is_last or not (is_absence(error) or self._removes_unfinished(outer, error)):
                    raise
                self._make_directory(outer)
            else:
                return

    def _make_directory(self, path: str) -> None:
        """Make one directory, unless it has appeared meanwhile."""
        with contextlib.suppress(FileExistsError):
            if not self._root.group_shared:
                self._os.make_directory(path)
                return
            self._os.make_directory(path, UNFINISHED_DIRECTORY_MODE)
            # A crash here leaves an empty directory, which the next store below removes.
            try:
                self._os.set_mode(path, GROUP_DIRECTORY_MODE)
            except OSError as error:
                # Another store took it for such a one: it is gone, or another user's now.
                if not (is_absence(error) or isinstance(error, PermissionError)):
                    raise

    def _removes_unfinished(self, path: str, error: OSError) -> bool:
        """Remove a directory whose maker died before it could be written; return whether that was it.

        One that is not empty is no such directory, and is refused for a reason that stays.
        """
        if not self._root.group_shared or error.errno != errno.EACCES:
            return False
        try:
            self._os.remove_directory(path)
        except OSError:
            return False
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

    def _sync_names(self, path: str) -> None:
        """Put a blob's name on the disk, and those of the directories above, whoever made them."""
        leaf = path.rpartition("/")[0]
        self._sync_directory(leaf)
        if leaf not in self._durable_leaves:
            outer = leaf.rpartition("/")[0]
            self._sync_directory(outer)
            self._sync_directory(outer.rpartition("/")[0])
            self._durable_leaves.add(leaf)

    def _sync_directory(self, path: str) -> None:
        fd = self._os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._os.sync(fd)
        finally:
            self._os.close(fd)
