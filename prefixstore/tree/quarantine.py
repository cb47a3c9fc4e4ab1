"""Where corrupt blobs go: out of the way at once, kept for inspection, bounded.

A blob that failed a check is renamed to ``quarantine/<reason>.<random>.<key>.kv``, so that the next
store of its key finds the place free. The oldest go first when the quarantine is over its limit. Both
are safe for several hosts at once: each rename and unlink is of one name, and a lost race is no error.

Between the reading that condemned a file and the rename, another host may have put a sound blob in its place.
So what was moved is read once more, here, where nobody replaces it, and a sound one gets its name back.
"""

import contextlib
import os
import re
import uuid

from prefixstore.blob.header import HEADER_BYTES, decode_header, file_bytes
from prefixstore.blob.reasons import MissReason
from prefixstore.blob.verify import check_image
from prefixstore.errors import CorruptError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.documents import put_name
from prefixstore.tree.osfs import Stat
from prefixstore.tree.paths import BLOB_SUFFIX
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_absence, is_missing, translate

__all__ = ["Quarantine"]

FILES_MAX = 256
"""A few hundred samples tell what is wrong with a server; the bytes are limited besides."""
_NAME = re.compile(r"[a-z_]+\.[0-9a-f]{8}\.[0-9a-f]+\.kv")


class Quarantine:
    """The quarantine of one root. Safe for concurrent use."""

    def __init__(self, root: Root, *, bytes_max: int) -> None:
        self._root = root
        self._os = root.os_calls
        self._bytes_max = bytes_max

    def take(self, namespace: NamespaceId, key: Key, reason: MissReason) -> bool:
        """Move a blob here; returns whether it was there, and is damaged.

        Raises:
            UnavailableError: It cannot be moved.
        """
        source = self._root.layout.blob(namespace, key)
        directory = self._root.layout.quarantine
        target = f"{directory}/{reason}.{uuid.uuid4().hex[:8]}.{key.hex()}{BLOB_SUFFIX}"
        try:
            try:
                self._os.rename(source, target)
            except FileNotFoundError:
                # The quarantine itself may be gone: an operator emptied it by removing it.
                self._root.ensure_directory(directory)
                self._os.rename(source, target)
        except OSError as error:
            if is_absence(error):
                return False
            raise translate(error, doing="move into quarantine", path=source) from error
        # A payload that does not decode is sound as far as its digest goes.
        if reason is not MissReason.CODEC and self._is_sound(target, namespace, key):
            self._give_back(target, source)
            return False
        self._trim()
        return True

    def contents(self) -> list[tuple[str, Stat]]:
        """Return names and sizes of what is here, oldest first."""
        path = self._root.layout.quarantine
        try:
            names = [e.name for e in self._os.scan(path) if e.is_file and _NAME.fullmatch(e.name)]
        except OSError as error:
            if is_missing(error):
                return []
            raise translate(error, doing="list", path=path) from error
        found: list[tuple[str, Stat]] = []
        for name in names:
            with contextlib.suppress(OSError):  # Another host trims, too.
                found.append((name, self._os.stat(f"{path}/{name}")))
        return sorted(found, key=lambda item: item[1].modified_s)

    def _is_sound(self, path: str, namespace: NamespaceId, key: Key) -> bool:
        """Whether a file is the whole, intact blob of a key; what cannot be read is not."""
        try:
            fd = self._os.open(path, os.O_RDONLY)
            try:
                size = self._os.stat_open(fd).size_bytes
                # By its first page already: garbage may be as long as all memory.
                page = self._read(fd, HEADER_BYTES)
                if file_bytes(decode_header(page).stored_bytes) != size:
                    return False
                header = check_image(self._read(fd, size))
            finally:
                self._os.close(fd)
        except (OSError, CorruptError, MemoryError):
            return False
        return (header.namespace, header.key) == (namespace, key)

    def _read(self, fd: int, size_bytes: int) -> memoryview:
        """Return the beginning of a file; less where it ends before that."""
        image = memoryview(bytearray(size_bytes))
        done = 0
        while count := self._os.read_into(fd, image[done:], done):
            done += count
        return image[:done]

    def _give_back(self, path: str, source: str) -> None:
        """Give a sound blob its name again, unless another has it by now.

        Raises:
            UnavailableError: It cannot be named; it stays in the quarantine.
        """
        try:
            put_name(path, source, os_calls=self._os)
            self._os.unlink(path)
        except OSError as error:
            if not is_absence(error):
                raise translate(error, doing="give back", path=source) from error

    def _trim(self) -> None:
        contents = self.contents()
        total = sum(stat.disk_bytes for _, stat in contents)
        files = len(contents)
        for name, stat in contents:
            if total <= self._bytes_max and files <= FILES_MAX:
                return
            try:
                self._os.unlink(f"{self._root.layout.quarantine}/{name}")
            except OSError:
                return  # Another host trims, too; or this mount may not: then somebody else will.
            total -= stat.disk_bytes
            files -= 1
