"""How many bytes a root holds, as all its hosts know it: the last scan of anyone, and what came since.

    collector/scan.json              what the last whole scan of the tree met, and which accounts it knew
    collector/usage-<writer>.json    what one writer has stored and removed since it began

    used bytes = what the scan met
               + what each writer has stored since the scan began
               - what each writer has removed since the scan ended

What happens during a scan may have been met by it or not; counted like this the sum errs upwards only, and
the next scan mends it. It decides when to scan and when stores wait, never what goes: an eviction starts
from a scan. It does not depend on what this host's index happens to know, so processes that share an index
and hosts that share only the root reckon alike. Until anyone has scanned there is only the index to ask.

A writer's own bytes are exact at once; others hear of them when they ask, after a step of bytes
(``prefixstore.store.space`` says which) or some seconds.
"""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing

__all__ = ["INTERVAL_S", "STEP_BYTES", "ScanMark", "Usage"]

INTERVAL_S = 5.0
STEP_BYTES = 64 * 2**20
"""A writer tells others after so long, or at once after so much, or less where the quota is small. Smaller
values cost a small file the more often."""
FILE_KEPT_S = 86400.0
"""The account of a writer that has left or died goes after a day, once a scan has met what it tells."""
ACTIVE_S = 60.0
"""A writer whose account changed within this time counts as one that may store at any moment."""

_NAME = re.compile(r"usage-([0-9a-f]{32})\.json")
Identity = tuple[int, float, int]


class UsageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/usage-<writer>.json``: bytes by namespace since the writer began; they only grow."""

    stored: dict[str, int]
    removed: dict[str, int]


class ScanDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/scan.json``.

    Attributes:
        used: Bytes met, by namespace.
        stored: Of each account known when the scan began, what it told as stored.
        removed: Of each account known when the scan ended, what it told as removed.
    """

    used: dict[str, int]
    stored: dict[str, dict[str, int]]
    removed: dict[str, dict[str, int]]


ScanMark = dict[str, dict[str, int]]
"""What each writer had stored when a scan began."""


class Usage:
    """One writer's account, and its view of the root. Safe for concurrent use.

    ``_lock`` is a leaf, held for arithmetic only. ``_exchanging`` is held around I/O, one at a time, and
    comes before it.
    """

    def __init__(
        self, root: Root, *, writer: str, read_only: bool, wanted: Callable[[], bool], clock: Clock
    ) -> None:
        """Begin an account.

        Args:
            root: The root.
            writer: This writer's id.
            read_only: Hear, but tell nothing.
            wanted: Says whether there is a quota to keep. An account is kept also where others keep
                theirs: an eviction by hand must be heard of.
            clock: For the intervals.
        """
        self._root = root
        self._writer = writer
        self._read_only = read_only
        self._wanted = wanted
        self._clock = clock
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._untold_bytes = 0
        self._due_at_s = float("-inf")
        self._accounts: dict[str, tuple[Identity, UsageDocument]] = {}
        self._changed_at_s: dict[str, float] = {}
        self._scan: ScanDocument | None = None
        self._scan_identity: Identity | None = None
        self._scan_seen_at_s = clock.monotonic_s()

    @property
    def writers(self) -> int:
        """How many writers may store at any moment, this one included."""
        since_s = self._clock.monotonic_s() - ACTIVE_S
        others = [at_s for writer, at_s in self._changed_at_s.items() if writer != self._writer]
        return 1 + sum(at_s >= since_s for at_s in others)

    @property
    def scan_age_s(self) -> float:
        """For how long, by this host's clock, nobody has ended a scan of the tree, as far as it saw."""
        return self._clock.monotonic_s() - self._scan_seen_at_s

    def stored(self, namespace: NamespaceId, file_bytes: int) -> None:
        """Count what this writer has published."""
        with self._lock:
            self._stored[namespace] += file_bytes
            self._untold_bytes += file_bytes

    def removed(self, namespace: NamespaceId, file_bytes: int) -> None:
        """Count what this writer has removed."""
        with self._lock:
            self._removed[namespace] += file_bytes
            self._untold_bytes += file_bytes

    def used_bytes(self) -> dict[NamespaceId, int] | None:
        """Return what the root holds, by namespace; None while nobody has scanned it."""
        scan = self._scan
        if scan is None:
            return None
        used = Counter(scan.used)
        for writer, account in self._all_accounts().items():
            used.update(account.stored)
            used.subtract(account.removed)
            used.subtract(scan.stored.get(writer, {}))
            used.update(scan.removed.get(writer, {}))
        return {NamespaceId(name): max(0, size) for name, size in used.items()}

    def exchange(self, *, step_bytes: int = STEP_BYTES, hear: bool = False) -> None:
        """Tell others if it is time, and hear from them then; what fails waits for the next time.

        Args:
            step_bytes: Tell after so much at the latest.
            hear: Hear in any case.
        """
        if not self._wanted() and self._scan is None:
            return
        is_due = self._clock.monotonic_s() >= self._due_at_s
        tells = self._untold_bytes >= (1 if is_due else max(1, step_bytes))
        if tells or is_due or hear:
            with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
                if tells:
                    self._tell()
                self._due_at_s = self._clock.monotonic_s() + INTERVAL_S
                self._hear()

    def begin_scan(self) -> ScanMark:
        """Hear from others before a scan; returns what ``end_scan`` needs."""
        with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
            self._hear()
        return {writer: dict(a.stored) for writer, a in self._all_accounts().items()}

    def end_scan(self, mark: ScanMark, used: Mapping[NamespaceId, int]) -> None:
        """Tell all hosts what a whole scan has met, if any of them has a quota to keep."""
        if self._read_only or not (self._wanted() or self._scan is not None):
            return
        with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
            self._tell()
            self._hear()
            document = ScanDocument(
                used={str(namespace): size for namespace, size in used.items()},
                stored=mark,
                removed={w: dict(a.removed) for w, a in self._all_accounts().items()},
            )
            self._replace(self._scan_path, document)
            # Believed as written: this host's view of the directory may lag behind.
            self._scan = document
            self._scan_seen_at_s = self._clock.monotonic_s()

    def forget_old(self, *, server_now_s: float) -> None:
        """Remove the accounts of writers that have long gone, once a scan has met what they tell."""
        scan = self._scan
        for writer, ((_, modified_s, _), told) in list(self._accounts.items()):
            is_old = server_now_s - modified_s > FILE_KEPT_S
            is_met = scan is not None and (
                scan.stored.get(writer) == told.stored and scan.removed.get(writer) == told.removed
            )
            if writer != self._writer and is_old and is_met:
                with contextlib.suppress(OSError):
                    self._root.os_calls.unlink(self._path(writer))

    def _all_accounts(self) -> dict[str, UsageDocument]:
        """Return the accounts of others as told, and this writer's as it is."""
        accounts = {writer: told for writer, (_, told) in self._accounts.items()}
        with self._lock:
            accounts[self._writer] = UsageDocument(
                stored=dict(self._stored), removed=dict(self._removed)
            )
        return accounts

    def _tell(self) -> None:
        if self._read_only or not self._untold_bytes:
            return
        with self._lock:
            untold_bytes = self._untold_bytes
            document = UsageDocument(stored=dict(self._stored), removed=dict(self._removed))
        self._replace(self._path(self._writer), document)
        with self._lock:
            self._untold_bytes -= untold_bytes

    def _replace(self, path: str, document: msgspec.Struct) -> None:
        calls, group_shared = self._root.os_calls, self._root.group_shared
        replace_document(path, document, os_calls=calls, group_shared=group_shared)

    def _hear(self) -> None:
        calls, directory = self._root.os_calls, self._root.layout.collector
        accounts: dict[str, tuple[Identity, UsageDocument]] = {}
        try:
            entries = calls.scan(directory)
        except OSError as error:
            if is_missing(error):
                return
            raise
        for entry in entries:
            name = _NAME.fullmatch(entry.name)
            if name is None or not entry.is_file:
                continue
            writer, path = name[1], f"{directory}/{entry.name}"
            before = self._accounts.get(writer)
            try:
                identity = self._identity(path)
                if before is not None and before[0] == identity:
                    accounts[writer] = before
                    continue
                found = read_document(path, UsageDocument, os_calls=calls)
            except (PrefixStoreError, OSError):
                found = None
            if found is not None:
                accounts[writer] = (identity, found)
                self._changed_at_s[writer] = self._clock.monotonic_s()
            elif before is not None:
                accounts[writer] = (
                    before  # Replaced this moment, or damaged: what it said stays said.
                )
        self._accounts = accounts
        self._changed_at_s = {w: at for w, at in self._changed_at_s.items() if w in accounts}
        self._hear_of_scan()

    def _hear_of_scan(self) -> None:
        try:
            identity = self._identity(self._scan_path)
        except OSError as error:
            if not is_missing(error):
                raise
            return
        if identity == self._scan_identity:
            return
        with contextlib.suppress(PrefixStoreError):
            found = read_document(self._scan_path, ScanDocument, os_calls=self._root.os_calls)
            if found is not None:
                self._scan, self._scan_identity = found, identity
                self._scan_seen_at_s = self._clock.monotonic_s()

    def _identity(self, path: str) -> Identity:
        stat = self._root.os_calls.stat(path)
        return stat.inode, stat.modified_s, stat.size_bytes

    @property
    def _scan_path(self) -> str:
        return f"{self._root.layout.collector}/scan.json"

    def _path(self, writer: str) -> str:
        return f"{self._root.layout.collector}/usage-{writer}.json"
