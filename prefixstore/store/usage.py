"""How many bytes a root holds, as all its hosts know it: the last scan of anyone, and what came since.

    collector/scan.json              what the last whole scan of the tree met, and which accounts it knew
    collector/usage-<account>.json   what one writer has stored and removed since it began the account

    used bytes = what the scan met
               + what each writer has stored since the scan began
               - what each writer has removed since the scan ended

What happens during a scan may have been met by it or not; counted like this the sum errs upwards only, and
the next scan mends it. It decides when to scan and when stores wait, never what goes: an eviction starts
from a scan. It does not depend on what this host's index happens to know, so processes that share an index
and hosts that share only the root reckon alike. Until anyone has scanned there is only the index to ask.

A writer's own bytes are exact at once; others hear of them when they ask, after a step of bytes
(``prefixstore.store.space`` says which) or some seconds.

An account that was still for a day is forgotten, once a scan has met all that it tells. Told whole again
after a scan that does not know it, it would take away once more what was removed long ago. So a writer shows
every hour that its account lives; one that was stopped for longer, and finds its account gone, goes on under
a new one with what no scan has met. And a scan hands on what the one before it knew of accounts that are
gone, should one be told in the very moment in which it goes.
"""

import contextlib
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_absence, is_missing

__all__ = ["INTERVAL_S", "STEP_BYTES", "ScanMark", "Usage"]

INTERVAL_S = 5.0
STEP_BYTES = 64 * 2**20
"""A writer tells others after so long, or at once after so much, or less where the quota is small. Smaller
values cost a small file the more often."""
FILE_KEPT_S = 86400.0
"""The account of a writer that has left or died goes after a day, once a scan has met what it tells."""
REFRESH_S = 3600.0
"""How often a writer shows that its account lives: one metadata write an hour, so that a mount may fail for
most of a day before a new account is needed."""
GONE_KEPT = 1024
"""Accounts that are gone of which a scan hands on what was known: 160 bytes each, and the oldest go first.
Collectors that open the root anew for each pass leave some hundred a day."""
ACTIVE_S = 60.0
"""A writer whose account changed within this time counts as one that may store at any moment."""

_NAME = re.compile(r"usage-([0-9a-f]{32})\.json")
Identity = tuple[int, float, int]


class UsageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/usage-<account>.json``: bytes by namespace since the account began; they only grow."""

    stored: dict[str, int]
    removed: dict[str, int]


class ScanDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/scan.json``.

    Attributes:
        used: Bytes met, by namespace.
        stored: Of each account known when the scan began, what it told as stored; and of some that are
            gone, what an earlier scan knew.
        removed: Of each account known when the scan ended, what it told as removed; and so on.
    """

    used: dict[str, int]
    stored: dict[str, dict[str, int]]
    removed: dict[str, dict[str, int]]


ScanMark = dict[str, dict[str, int]]
"""What each account told as stored when a scan began."""


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
            writer: This writer's id, which names its first account.
            read_only: Hear, but tell nothing.
            wanted: Says whether there is a quota to keep. An account is kept also where others keep
                theirs: an eviction by hand must be heard of.
            clock: For the intervals.
        """
        self._root = root
        self._account = writer
        self._read_only = read_only
        self._wanted = wanted
        self._clock = clock
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()
        self._stored: Counter[str] = Counter()
        self._removed: Counter[str] = Counter()
        self._untold_bytes = 0
        self._told: UsageDocument | None = None
        self._refresh_at_s = float("-inf")
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
        others = [at_s for account, at_s in self._changed_at_s.items() if account != self._account]
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
        for account, told in self._all_accounts().items():
            used.update(told.stored)
            used.subtract(told.removed)
            used.subtract(scan.stored.get(account, {}))
            used.update(scan.removed.get(account, {}))
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
            with self._exchanging:
                # Who cannot tell can hear all the same.
                with contextlib.suppress(PrefixStoreError, OSError):
                    if tells or self._clock.monotonic_s() >= self._refresh_at_s:
                        self._tell()
                self._due_at_s = self._clock.monotonic_s() + INTERVAL_S
                with contextlib.suppress(PrefixStoreError, OSError):
                    self._hear()

    def begin_scan(self) -> ScanMark:
        """Hear from others before a scan; returns what ``end_scan`` needs."""
        with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
            self._hear()
        return {account: dict(told.stored) for account, told in self._all_accounts().items()}

    def end_scan(self, mark: ScanMark, used: Mapping[NamespaceId, int]) -> None:
        """Tell all hosts what a whole scan has met, if any of them has a quota to keep."""
        if self._read_only or not (self._wanted() or self._scan is not None):
            return
        with self._exchanging, contextlib.suppress(PrefixStoreError, OSError):
            self._tell()
            self._hear()
            before, accounts = self._scan, self._all_accounts()
            removed = {account: dict(told.removed) for account, told in accounts.items()}
            document = ScanDocument(
                used={str(namespace): size for namespace, size in used.items()},
                stored=_with_gone(mark, before.stored if before is not None else {}),
                removed=_with_gone(removed, before.removed if before is not None else {}),
            )
            self._replace(self._scan_path, document)
            # Believed as written: this host's view of the directory may lag behind.
            self._scan = document
            self._scan_seen_at_s = self._clock.monotonic_s()

    def forget_old(self, *, server_now_s: float) -> None:
        """Remove the accounts that were still for long, once a scan has met what they tell.

        What fails waits for the next time.
        """
        with self._exchanging:
            try:
                # Who has just opened the root has heard of none.
                self._hear()
            except (PrefixStoreError, OSError):
                return
            scan, accounts = self._scan, self._accounts
        for account, (identity, told) in accounts.items():
            is_old = server_now_s - identity[1] > FILE_KEPT_S
            is_met = scan is not None and (
                scan.stored.get(account) == told.stored
                and scan.removed.get(account) == told.removed
            )
            if account != self._account and is_old and is_met:
                path = self._path(account)
                with contextlib.suppress(OSError):
                    # Its writer may have come back since.
                    if self._identity(path) == identity:
                        self._root.os_calls.unlink(path)

    def _all_accounts(self) -> dict[str, UsageDocument]:
        """Return the accounts of others as told, and this writer's as it is."""
        with self._lock:
            accounts = {account: told for account, (_, told) in self._accounts.items()}
            accounts[self._account] = UsageDocument(
                stored=dict(self._stored), removed=dict(self._removed)
            )
        return accounts

    def _tell(self) -> None:
        if self._read_only:
            return
        self._refresh()
        if not self._untold_bytes:
            return
        with self._lock:
            untold_bytes = self._untold_bytes
            document = UsageDocument(stored=dict(self._stored), removed=dict(self._removed))
        # An account that goes right here comes back whole: the scans that follow know what was met of it.
        self._replace(self._path(self._account), document)
        self._told = document
        with self._lock:
            self._untold_bytes -= untold_bytes

    def _refresh(self) -> None:
        """Show that this writer's account lives, and find out whether somebody has forgotten it.

        By a touch and not a look: a mount may remember for minutes what is not there any more.
        """
        if self._told is not None:
            try:
                self._root.os_calls.touch(self._path(self._account))
            except OSError as error:
                if not is_absence(error):
                    raise
                self._begin_anew(self._told)
        self._refresh_at_s = self._clock.monotonic_s() + REFRESH_S

    def _begin_anew(self, told: UsageDocument) -> None:
        """Go on under an account that no scan knows, with what no scan has met of the one that is gone.

        What it has removed since is left out: a scan may have missed it already, and the sum errs upwards.
        """
        # A mount that has gone away has forgotten nobody.
        self._root.os_calls.stat(self._root.layout.collector)
        self._hear_of_scan()
        # It goes once a scan has met all of it, so one that does not know it has met that, too.
        scan = self._scan
        met = {} if scan is None else scan.stored.get(self._account, told.stored)
        with self._lock:
            self._accounts = {a: each for a, each in self._accounts.items() if a != self._account}
            self._account = uuid.uuid4().hex
            self._stored = self._stored - Counter(met)
            self._removed = Counter()
            self._untold_bytes = self._stored.total()
        self._told = None

    def _replace(self, path: str, document: msgspec.Struct) -> None:
        calls, mode = self._root.os_calls, self._root.document_mode
        replace_document(path, document, os_calls=calls, mode=mode)

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
            if name is not None and entry.is_file:
                account = self._hear_account(name[1])
                if account is not None:
                    accounts[name[1]] = account
        self._accounts = accounts
        self._changed_at_s = {a: at for a, at in self._changed_at_s.items() if a in accounts}
        if self._told is not None and self._account not in accounts:
            # Forgotten, or this listing lags behind: a touch will tell.
            self._refresh_at_s = float("-inf")
        self._hear_of_scan()

    def _hear_account(self, account: str) -> tuple[Identity, UsageDocument] | None:
        """Return what an account tells; or what it told before, if it is replaced this moment or damaged."""
        path, before = self._path(account), self._accounts.get(account)
        try:
            identity = self._identity(path)
            if before is not None and before[0] == identity:
                return before
            told = read_document(path, UsageDocument, os_calls=self._root.os_calls)
        except (PrefixStoreError, OSError):
            return before
        if told is None:
            return before
        if before is None or before[1] != told:
            self._changed_at_s[account] = self._clock.monotonic_s()
        return identity, told

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

    def _path(self, account: str) -> str:
        return f"{self._root.layout.collector}/usage-{account}.json"


def _with_gone(
    known: Mapping[str, dict[str, int]], before: Mapping[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Return what is known of each account, with what an earlier scan knew of those that are gone.

    >>> _with_gone({"b": {"ns": 3}}, {"a": {"ns": 1}, "b": {"ns": 2}})
    {'a': {'ns': 1}, 'b': {'ns': 3}}
    """
    gone = [account for account in before if account not in known][-GONE_KEPT:]
    return {account: before[account] for account in gone} | dict(known)
