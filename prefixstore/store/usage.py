"""What other hosts have stored and removed since this host last looked at the whole tree.

Each writer of a root with a quota keeps one small file, written at most every few seconds:

    collector/usage-<writer>.json    by how many bytes it has changed the root, and which index knows

    used bytes = what this host's index counts
               + what the writers of other indexes have changed since this host's last scan

The sum is an estimate: a chunk that was found by probing counts twice until the next scan. It decides
when to scan, never what goes: an eviction starts from a scan, and the scan starts the sum anew. Without
it each of n hosts would see its own part of the root only, and n quotas would fit into one.
"""

import contextlib
import re
import threading
import uuid

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.store.hints import Hints
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.root import Root

__all__ = ["Usage"]

INTERVAL_S = 5.0
STEP_BYTES = 64 * 2**20
"""A writer tells others after so long, or at once after so much. The quota can be exceeded by the step
and by what is written in the interval, for each host; smaller values cost a small file the more often."""
FILE_KEPT_S = 86400.0
"""A writer that has left or died still counts for hosts that have not scanned since. After a day nobody
waits for it: an engine scans when it starts, and whenever the root fills up."""
INDEX_MARK = "index_id"

_NAME = re.compile(r"usage-([0-9a-f]{32})\.json")


class UsageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/usage-<writer>.json``."""

    index: str
    """Which index has learnt of these bytes: those who share it count them already."""
    net_bytes: int
    """Stored less removed, since the writer began."""


class Usage:
    """One writer's account, and its view of the others'. Safe for concurrent use.

    The lock is held for arithmetic only; ``exchange`` and ``begin_scan`` do I/O, one at a time.
    """

    def __init__(
        self, root: Root, hints: Hints, *, writer: str, enabled: bool, clock: Clock
    ) -> None:
        self._root = root
        self._hints = hints
        self._writer = writer
        self._enabled = enabled
        self._clock = clock
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()
        self._mine_bytes = 0
        self._told_bytes = 0
        self._due_at_s = float("-inf")
        self._seen: dict[str, tuple[tuple[int, float], UsageDocument]] = {}
        self._at_scan: dict[str, int] = {}
        self._others_bytes = 0

    @property
    def others_bytes(self) -> int:
        """By how much others have changed the root since the last scan; may be negative."""
        return self._others_bytes

    def changed(self, file_bytes: int) -> None:
        """Count what this writer has stored (positive) or removed (negative)."""
        if self._enabled:
            with self._lock:
                self._mine_bytes += file_bytes

    def exchange(self, *, at_once: bool = False) -> None:
        """Tell others and hear from them, if it is time; what fails waits for the next time."""
        if not self._enabled:
            return
        moved_bytes = abs(self._mine_bytes - self._told_bytes)
        is_due = self._clock.monotonic_s() >= self._due_at_s or moved_bytes >= STEP_BYTES
        if is_due or (at_once and moved_bytes):
            with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
                self._exchange()

    def begin_scan(self) -> dict[str, int]:
        """Hear from others before a scan; returns what ``end_scan`` needs."""
        if not self._enabled:
            return {}
        with self._exchanging:
            with contextlib.suppress(PrefixStoreError, OSError):
                self._exchange()
            return {writer: found.net_bytes for writer, (_, found) in self._seen.items()}

    def end_scan(self, at_begin: dict[str, int]) -> None:
        """Start the sum anew from where the scan began: the index knows all that was there then."""
        with self._lock:
            self._at_scan = at_begin
        self._add_up()

    def forget_old(self, *, server_now_s: float) -> None:
        """Remove the files of writers that have long gone."""
        for writer, ((_, modified_s), _) in list(self._seen.items()):
            if writer != self._writer and server_now_s - modified_s > FILE_KEPT_S:
                with contextlib.suppress(OSError):
                    self._root.os_calls.unlink(self._path(writer))

    def _exchange(self) -> None:
        self._due_at_s = self._clock.monotonic_s() + INTERVAL_S
        mine_bytes = self._mine_bytes
        if mine_bytes != self._told_bytes:
            document = UsageDocument(index=self._index_id(), net_bytes=mine_bytes)
            replace_document(
                self._path(self._writer),
                document,
                os_calls=self._root.os_calls,
                group_shared=self._root.group_shared,
            )
            self._told_bytes = mine_bytes
        self._read_others()
        self._add_up()

    def _read_others(self) -> None:
        calls, directory = self._root.os_calls, self._root.layout.collector
        seen: dict[str, tuple[tuple[int, float], UsageDocument]] = {}
        for entry in calls.scan(directory):
            name = _NAME.fullmatch(entry.name)
            if name is None or not entry.is_file:
                continue
            writer = name[1]
            with contextlib.suppress(PrefixStoreError, OSError):
                stat = calls.stat(f"{directory}/{entry.name}")
                identity = (stat.inode, stat.modified_s)
                before = self._seen.get(writer)
                if before is not None and before[0] == identity:
                    seen[writer] = before
                    continue
                found = read_document(f"{directory}/{entry.name}", UsageDocument, os_calls=calls)
                if found is not None:
                    seen[writer] = (identity, found)
        self._seen = seen

    def _add_up(self) -> None:
        index_id = self._index_id()
        with self._lock:
            self._others_bytes = sum(
                found.net_bytes - self._at_scan.get(writer, 0)
                for writer, (_, found) in self._seen.items()
                if found.index != index_id
            )

    def _index_id(self) -> str:
        """Return the id of this host's index, which all processes that share it read from it."""
        found = self._hints.mark(INDEX_MARK)
        if found is None:
            self._hints.set_mark(INDEX_MARK, uuid.uuid4().hex)
            # Of two processes that begin at once the later one's id stays.
            found = self._hints.mark(INDEX_MARK)
        return found or ""

    def _path(self, writer: str) -> str:
        return f"{self._root.layout.collector}/usage-{writer}.json"
