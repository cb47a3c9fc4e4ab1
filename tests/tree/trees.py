"""Roots, trees and chunks for the tests of the tree."""

import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prefixstore.blob.header import HEADER_BYTES
from prefixstore.config import Codec, StoreConfig
from prefixstore.keys import Key, NamespaceId, make_key
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.blobs import BlobTree, ChunkHead, Miss, Stored
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import Os
from prefixstore.tree.root import Root
from prefixstore.tree.writers import Writers, this_process
from tests.blob.samples import bfloat16_noise

FIELDS = {"model": "tiny", "dtype": "bfloat16", "layout": {"blocks": 2, "heads": [1, 2]}}
RAW_BYTES = 20_000
"""Five pages: a short write has somewhere to end."""

_NOISE = bfloat16_noise(RAW_BYTES // 2)


def key_of(name: str) -> Key:
    return make_key(hashlib.sha256(name.encode()).digest() + bytes(4))


def payload_of(key: Key, raw_bytes: int = RAW_BYTES) -> bytes:
    """The one payload that belongs to a key: compressible, and with the key in it."""
    noise = _NOISE * (raw_bytes // RAW_BYTES + 1)
    return (key * 8 + noise)[:raw_bytes]


@dataclass
class Fixture:
    """One root as one process sees it."""

    path: str
    os_calls: Os = field(default_factory=QuickOs)
    options: dict[str, object] = field(default_factory=dict)
    writer: str | None = None

    def __post_init__(self) -> None:
        config = StoreConfig.from_mapping({"direct_io": "off"} | self.options)
        self.root = Root.create(self.path, os_calls=self.os_calls, group_shared=config.group_shared)
        self.namespace: NamespaceId = self.root.namespace(FIELDS, create=True)
        self.tree = BlobTree(self.root, config=config, writer=self.writer)
        self.writers = Writers(self.root, this=this_process())

    def store(self, key: Key, *, codec: Codec = Codec.RAW, raw_bytes: int = RAW_BYTES) -> Stored:
        buffer = Buffer.allocate(raw_bytes)
        buffer.payload(raw_bytes)[:] = payload_of(key, raw_bytes)
        head = ChunkHead(key=key, parent=None, end_token=16, codec=codec)
        return self.tree.store(self.namespace, head, buffer, raw_bytes=raw_bytes)

    def load(self, key: Key, *, raw_bytes: int = RAW_BYTES) -> bytes | str:
        """Return a blob's payload, or the reason of the miss."""
        buffer = Buffer.allocate(raw_bytes)
        buffer.image[:] = b"\xee" * len(buffer.image)
        found = self.tree.load(self.namespace, key, buffer, raw_bytes=raw_bytes)
        return str(found.reason) if isinstance(found, Miss) else bytes(buffer.payload(raw_bytes))

    def file_of(self, key: Key) -> Path:
        return Path(self.root.layout.blob(self.namespace, key))

    def damage(self, key: Key) -> None:
        """Change the first byte of a blob's payload, as a failing disk does."""
        with self.file_of(key).open("r+b") as file:
            file.seek(HEADER_BYTES)
            file.write(bytes([payload_of(key)[0] ^ 1]))

    def temporaries(self) -> list[str]:
        """Return every file of any writer that is not published."""
        return sorted(str(path) for path in Path(self.root.path).rglob("*.tmp"))


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its exit status, negative for a signal."""
    return in_children(1, lambda _: work())[0]


def in_children(count: int, work: Callable[[int], object]) -> list[int]:
    """Run ``work`` in several forked children at once; return their exit statuses."""
    sys.stdout.flush()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(number)
                status = 0
            except BaseException:  # noqa: BLE001 - the parent sees the status only
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


KILLED = -signal.SIGKILL
