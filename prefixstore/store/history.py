"""What a root was worth, hour by hour: each writer keeps its counters of a day in one small file.

    history/<yyyymmdd>-<writer>.json    the namespace, and what was counted in each hour of that day (UTC)

Counters in memory end with their process; an operator asks weeks later what the root has saved. Files of one
writer each need no lock, and adding them up is the reader's business. Nothing depends on them: a file that
cannot be written, or is lost, costs a plot some of its past.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.store.counters import Counters
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.root import Root
from prefixstore.tree.scan import names_in

__all__ = ["HOUR_S", "Hour", "Recorder", "forget_old_history", "read_history"]

HOUR_S = 3600
INTERVAL_S = 300.0
"""How much of the counters a kill may lose; one small file of a busy writer is replaced so often."""
DAYS_KEPT = 90
"""A quarter: long enough to see a season of use, some 50 KB a writer and day at the most."""

_NAME = re.compile(r"(\d{8})-([0-9a-f]{32})\.json")


class DayDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``history/<yyyymmdd>-<writer>.json``."""

    namespace: str
    hours: dict[str, dict[str, int]]
    """Sums by the hour's two digits and the counter's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """What one writer counted in one hour.

    Attributes:
        starts_s: When the hour began, in seconds since the epoch.
        namespace: Where the writer loaded from and stored into.
        counts: Sums by the counter's name, as ``PrefixStore.counters`` names them.
    """

    starts_s: int
    namespace: NamespaceId
    counts: dict[str, int]


class Recorder:
    """Writes one writer's history. Safe for concurrent use; its lock is held while it writes."""

    def __init__(
        self,
        root: Root,
        counters: Counters,
        *,
        writer: str,
        namespace: NamespaceId,
        enabled: bool,
        clock: Clock,
        now_s: Callable[[], int],
    ) -> None:
        self._root = root
        self._counters = counters
        self._writer = writer
        self._namespace = namespace
        self._enabled = enabled
        self._clock = clock
        self._now_s = now_s
        self._lock = threading.Lock()
        self._due_at_s = clock.monotonic_s() + INTERVAL_S
        self._told: dict[str, int] = {}
        self._day = ""
        self._hours: dict[str, dict[str, int]] = {}

    def record(self, *, at_once: bool = False) -> None:
        """Write what was counted since the last time, if it is time; what fails waits for the next."""
        if not self._enabled or not (at_once or self._clock.monotonic_s() >= self._due_at_s):
            return
        with self._lock, contextlib.suppress(PrefixStoreError, OSError):
            self._due_at_s = self._clock.monotonic_s() + INTERVAL_S
            self._record()

    def _record(self) -> None:
        sums = self._counters.snapshot()
        new = {
            name: amount
            for name, total in sums.items()
            if (amount := total - self._told.get(name, 0))
        }
        if not new:
            return
        day, hour = _day_and_hour(self._now_s())
        hours = dict(self._hours) if day == self._day else {}
        before = hours.get(hour, {})
        hours[hour] = before | {name: before.get(name, 0) + amount for name, amount in new.items()}
        directory = self._root.layout.history
        self._root.ensure_directory(directory)
        replace_document(
            f"{directory}/{day}-{self._writer}.json",
            DayDocument(namespace=self._namespace, hours=hours),
            os_calls=self._root.os_calls,
            mode=self._root.document_mode,
        )
        self._told, self._day, self._hours = sums, day, hours


def read_history(root: Root, *, since_s: int = 0) -> tuple[list[Hour], list[str]]:
    """Return what all writers have counted, in no order, and sentences on what cannot be read.

    Args:
        root: The root.
        since_s: Leave out hours that began earlier, in seconds since the epoch.

    Raises:
        UnavailableError: The directory cannot be listed.
    """
    hours: list[Hour] = []
    errors: list[str] = []
    for day, path in _files(root):
        if day < datetime.fromtimestamp(since_s, UTC).strftime("%Y%m%d"):
            continue
        try:
            document = read_document(path, DayDocument, os_calls=root.os_calls)
            if document is not None:
                hours += [hour for hour in _hours(day, document) if hour.starts_s >= since_s]
        except (PrefixStoreError, ValueError) as error:
            errors.append(str(error))
    return hours, errors


def forget_old_history(root: Root, *, server_now_s: int) -> None:
    """Remove the files of days that nobody asks for any more; what fails is left for the next time."""
    last_day = (datetime.fromtimestamp(server_now_s, UTC) - timedelta(days=DAYS_KEPT)).strftime(
        "%Y%m%d"
    )
    for day, path in _files(root):
        if day < last_day:
            with contextlib.suppress(OSError):
                root.os_calls.unlink(path)


def _files(root: Root) -> Iterator[tuple[str, str]]:
    directory = root.layout.history
    for found in names_in(root.os_calls, directory, directories=False):
        name = _NAME.fullmatch(found)
        if name is not None:
            yield name[1], f"{directory}/{found}"


def _hours(day: str, document: DayDocument) -> Iterator[Hour]:
    starts_s = int(datetime.strptime(f"{day}+0000", "%Y%m%d%z").timestamp())
    for hour, counts in document.hours.items():
        if not (hour.isdecimal() and int(hour) < 24):  # noqa: PLR2004 - hours of a day
            raise InvalidError(f"history of {day}: {hour!r} is no hour of a day; remove the file")
        yield Hour(
            starts_s=starts_s + int(hour) * HOUR_S,
            namespace=NamespaceId(document.namespace),
            counts=counts,
        )


def _day_and_hour(now_s: int) -> tuple[str, str]:
    now = datetime.fromtimestamp(now_s, UTC)
    return now.strftime("%Y%m%d"), now.strftime("%H")
