"""One LMDB environment, used as LMDB demands: alone in importing lmdb, but for the child of ``probe``.

Owns the rules that make LMDB safe to share between processes that are killed at any moment:

    opened once       ``sharing`` has one ``Environment`` for each path in a process.
    never over fork   In a child everything raises until it opens anew; see ``sharing``.
    stale readers     A killed reader pins pages until the map is full, so ``reader_check`` runs at
                      open, each minute and when the map is full.
    growth            A full map doubles, up to a limit; a map that another process grew is adopted.
    short             A transaction holds the work of one call and ends before it returns; values are
                      copied out.

LMDB has no page checksum, and a damaged page can kill its process. ``probe`` looks before an
opening, values carry checksums, and damage found later is declared with a file beside the
environment: this process stops using it and the next opening discards it. What remains is a page
that was damaged after the probe: a crash, which a restart does not repeat.

With ``sync=False`` a power cut tears the file; ``place`` never hands out a file of another boot.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import lmdb

from prefixstore.clock import Clock
from prefixstore.errors import ClosedError, UnavailableError
from prefixstore.index.files import data_inode, declare_damaged
from prefixstore.index.gate import Gate

__all__ = [
    "FORMAT_NAME",
    "MAP_BYTES_MAX",
    "READERS_MAX",
    "DamageError",
    "Environment",
    "Table",
    "Tables",
    "Transaction",
    "open_handle",
]

MAP_BYTES_MAX = 2**36
"""Address space, not memory: room for some 150 million rows. A limit only so that a leak ends."""

FORMAT_NAME = "lmdb{}{}".format(*lmdb.version()[:2])
"""The directory of an environment names LMDB's file format: 0.9 and 1.0 cannot read each other."""
READERS_MAX = 1024
"""Reader slots; each thread inside a read takes one. LMDB's own 126 is few for a large host."""
READER_CHECK_S = 60.0
"""How long a killed reader may pin pages; a check costs a system call for each reader."""
ATTEMPTS_MAX = 40
"""Doublings from 1 MiB to ``MAP_BYTES_MAX`` are 16; the rest is for processes that grow in turns."""
FULL_WAIT_S = 0.01
"""Between two attempts at the limit of the map; all of them take less than half a second."""
Transaction: TypeAlias = "lmdb.Transaction[bytes]"
Table: TypeAlias = "lmdb._Database"  # noqa: SLF001 - its only name; used in annotations alone
T = TypeVar("T")

DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
)
"""Errors that only a damaged file causes; the others may pass."""


class DamageError(Exception):
    """A row failed its check inside a transaction. Never leaves ``Environment``."""


class Tables(NamedTuple):
    """Handles of the tables, by what they hold.

    Attributes:
        rows: Row key → record and children.
        waiting: Row key → children, of keys that have no row.
        pins: Row key → pins.
        recency: Recency key → nothing.
        notes: Sums for each namespace, and marks.
    """

    rows: Table
    waiting: Table
    pins: Table
    recency: Table
    notes: Table


class Environment:
    """An open environment, shared by everything in this process that acquired its path.

    Safe for concurrent use. Lock order: ``writing``, then ``gate``. Reads share the gate and never
    wait for each other, for a write or for another process. A write may wait for another process
    without a bound, if that was stopped inside a transaction. The map changes its size under both,
    alone in the gate.
    """

    def __init__(
        self, path: Path, *, handle: lmdb.Environment, clock: Clock, map_bytes_max: int
    ) -> None:
        self.path = path
        self.users = 1
        self.pid = os.getpid()
        self.unusable: str | None = None
        self.writing = threading.Lock()
        self.gate = Gate()
        self.handle: lmdb.Environment | None = handle
        self._clock = clock
        self._map_bytes_max = map_bytes_max
        self._inode = data_inode(path)
        self._checked_s = clock.monotonic_s()
        handle.reader_check()
        # A transaction like any other: the map may be full or grown by others at this moment.
        self.tables = self.write(
            lambda txn: Tables(*(handle.open_db(name.encode(), txn=txn) for name in Tables._fields))
        )

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` in a read-only transaction and return its answer.

        Raises:
            UnavailableError: The environment cannot be used.
            ClosedError: It was released.
        """
        for _ in range(ATTEMPTS_MAX):
            try:
                with self.gate.shared(), self._usable().begin(buffers=False) as txn:
                    return work(txn)
            except lmdb.MapResizedError:
                self._adopt_size()
            except lmdb.ReadersFullError:
                self._check_readers()
            except (lmdb.Error, DamageError) as error:
                raise self._refusal(error) from error
        raise self._gave_up()

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Run ``work`` in a write transaction, commit, and return its answer.

        ``work`` runs again from the start if the map had to grow; nothing of the aborted run stays.

        Raises:
            UnavailableError: The environment cannot be used; nothing was written.
            ClosedError: It was released.
        """
        with self.writing:
            for attempt in range(ATTEMPTS_MAX):
                try:
                    with self._usable().begin(write=True, buffers=False) as txn:
                        return work(txn)
                except lmdb.MapFullError:
                    if attempt == ATTEMPTS_MAX - 1:
                        raise self._full() from None
                    self._make_room(grow=attempt > 0)
                except lmdb.MapResizedError:
                    with self.gate.alone():
                        self._usable().set_mapsize(0)
                except (lmdb.Error, DamageError) as error:
                    raise self._refusal(error) from error
            raise self._gave_up()

    def map_bytes(self) -> int:
        """Return the size of the map, as this process sees it."""
        with self.gate.shared():
            return int(self._usable().info()["map_size"])

    def declare_damaged(self, found: str) -> UnavailableError:
        """Stop using the environment and have the next opening discard it."""
        self.unusable = (
            f"the index at {self.path} is damaged ({found}); nothing is lost, "
            "open the store's index again to start a new one"
        )
        declare_damaged(self.path)
        return UnavailableError(self.unusable)

    def _usable(self) -> lmdb.Environment:
        """Return the handle, after the checks that are due."""
        if self.pid != os.getpid():
            raise UnavailableError(
                f"the index at {self.path} was opened before a fork; open it again in this process"
            )
        if self.unusable is not None:
            raise UnavailableError(self.unusable)
        if self.handle is None:
            raise ClosedError(f"the index at {self.path} was closed")
        now_s = self._clock.monotonic_s()
        if now_s - self._checked_s >= READER_CHECK_S:
            self._checked_s = now_s
            if data_inode(self.path) != self._inode:
                self.unusable = (
                    f"the index at {self.path} was discarded by another process; open it again"
                )
                raise UnavailableError(self.unusable)
            self.handle.reader_check()
        return self.handle

    def _check_readers(self) -> None:
        with self.gate.shared():
            self._usable().reader_check()

    def _adopt_size(self) -> None:
        """Take over the map size that another process has set."""
        with self.writing, self.gate.alone():
            self._usable().set_mapsize(0)

    def _make_room(self, *, grow: bool) -> None:
        """Free what killed readers pin, or adopt what others added, else double the map.

        ``writing`` is held. Doubling without a look at the others' size would compound: each of them
        meets the full map in turn.
        """
        with self.gate.alone():
            handle = self._usable()
            if handle.reader_check() and not grow:
                return
            had = int(handle.info()["map_size"])
            handle.set_mapsize(0)
            adopted = int(handle.info()["map_size"])
            if adopted > had:
                return
            if 2 * adopted <= self._map_bytes_max:
                handle.set_mapsize(2 * adopted)
                return
        # At the limit, pages may still be pinned by a reader that is alive and soon done.
        self._clock.sleep(FULL_WAIT_S)

    def _refusal(self, error: Exception) -> UnavailableError:
        if isinstance(error, (DamageError, *DAMAGE)):
            return self.declare_damaged(str(error))
        return UnavailableError(
            f"the index at {self.path} cannot be used: {error}; "
            "check the space, the permissions and the health of its filesystem"
        )

    def _full(self) -> UnavailableError:
        return UnavailableError(
            f"the index at {self.path} has reached its limit of {self._map_bytes_max} bytes; "
            "remove the directory to start a new one, or raise map_bytes_max"
        )

    def _gave_up(self) -> UnavailableError:
        return UnavailableError(
            f"the index at {self.path} was still busy after {ATTEMPTS_MAX} attempts; try later"
        )


def open_handle(path: Path, *, map_bytes: int) -> lmdb.Environment:
    """Open the files in ``path``, made if missing.

    Raises:
        UnavailableError: LMDB cannot open them. Where the file itself is to blame, ``DAMAGED_NAME``
            now says so.
    """
    for _ in range(ATTEMPTS_MAX):
        try:
            return lmdb.open(
                os.fspath(path),
                map_size=map_bytes,
                max_dbs=len(Tables._fields),
                max_readers=READERS_MAX,
                mode=0o600,
                max_spare_txns=0,  # a cached transaction would cross a fork
                sync=False,  # the page cache outlives processes; other boots' files are discarded
                metasync=False,
                writemap=False,  # a writable map turns a full disk into SIGBUS
            )
        except lmdb.MapResizedError:
            # It grew between the look at its size and the first transaction.
            continue
        except (lmdb.Error, OSError) as error:
            if isinstance(error, DAMAGE):
                declare_damaged(path)
            raise UnavailableError(
                f"the index at {path} cannot be opened: {error}; "
                "check the space, the permissions and the health of its filesystem"
            ) from error
    raise UnavailableError(f"the index at {path} grows faster than it can be opened; try later")
