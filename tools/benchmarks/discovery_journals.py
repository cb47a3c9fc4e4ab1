"""A prototype that the store does not have: journals, by which writers tell others what they publish.

    ROOT/journals/<writer>      records of 40 bytes, appended: key, XXH32 of the key

A writer appends to its own file and closes it, so that others may see it. A reader lists the directory,
looks at each file's length and reads what is new. Measured beside what the store does; see
``discovery.py``.
"""

import os
from collections.abc import Sequence

import xxhash

from prefixstore.index.base import Index
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.osfs import Os, write_whole

__all__ = ["JournalReader", "JournalWriter"]

KEY_BYTES = 36
RECORD_BYTES = KEY_BYTES + 4


class JournalWriter:
    """One writer's journal."""

    def __init__(self, os_calls: Os, directory: str, writer: str) -> None:
        self._os = os_calls
        self._path = f"{directory}/{writer}"
        self._length = 0

    def append(self, keys: Sequence[Key]) -> None:
        """Tell others of keys: open, write, close."""
        record = b"".join(key + xxhash.xxh32_digest(key) for key in keys)
        fd = self._os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            view = memoryview(record)
            if self._length:
                self._os.write_from(fd, view, self._length)
            else:
                write_whole(self._os, fd, view)
        finally:
            self._os.close(fd)
        self._length += len(record)


class JournalReader:
    """Follows all journals of a root into an index."""

    def __init__(self, os_calls: Os, directory: str, index: Index, namespace: NamespaceId) -> None:
        self._os = os_calls
        self._directory = directory
        self._index = index
        self._namespace = namespace
        self._read_bytes: dict[str, int] = {}

    def follow(self) -> int:
        """Learn what is new; return how many keys that were."""
        learnt = 0
        for entry in self._os.scan(self._directory):
            path = f"{self._directory}/{entry.name}"
            done = self._read_bytes.get(path, 0)
            new_bytes = self._os.stat(path).size_bytes - done
            if new_bytes >= RECORD_BYTES:
                keys = self._read(path, done, new_bytes)
                self._index.put_many(
                    (self._namespace, key, Record(used_s=1, presumed=True)) for key in keys
                )
                self._read_bytes[path] = done + len(keys) * RECORD_BYTES
                learnt += len(keys)
        return learnt

    def _read(self, path: str, offset: int, length: int) -> list[Key]:
        fd = self._os.open(path, os.O_RDONLY)
        try:
            target = memoryview(bytearray(length))
            count = self._os.read_into(fd, target, offset)
        finally:
            self._os.close(fd)
        keys = []
        for at in range(0, count - RECORD_BYTES + 1, RECORD_BYTES):
            record = bytes(target[at : at + RECORD_BYTES])
            key = record[:KEY_BYTES]
            if xxhash.xxh32_digest(key) != record[KEY_BYTES:]:
                break  # Written, but not all of it has come yet.
            keys.append(Key(key))
        return keys
