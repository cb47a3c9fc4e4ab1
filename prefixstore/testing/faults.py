"""Faults at the seam to the operating system: kill, fail, cut short or repeat the N-th call of an ``Os``.

    calls = FaultyOs(RealOs(), When(number=7, fault=Fail(errno.ENOSPC)))

A **sweep** runs an operation once without a fault to learn its calls, then once for each call and each
fault, and looks at what is left on the disk after each:

    trace = FaultyOs(RealOs()); operation(trace)
    for call in trace.calls:
        for fault in faults_of(call.name):
            operation(FaultyOs(RealOs(), When(number=call.number, fault=fault)))

A disk that is full first cuts a write short, then refuses; see ``full_disk``. A mount that hangs is a
``Hang`` until the test lets go of it.

Calls are numbered from 1 over all threads, in the order in which they begin. ``Kill`` ends the whole
process with SIGKILL, so it belongs into a forked child. Nothing here knows what the calls are for.
"""

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from prefixstore.blob.header import ALIGN_BYTES
from prefixstore.tree.osfs import Entry, Os, Space, Stat

__all__ = [
    "ERRNOS",
    "Call",
    "Cut",
    "Fail",
    "Fault",
    "FaultyOs",
    "Hang",
    "Kill",
    "When",
    "faults_of",
    "full_disk",
]

T = TypeVar("T")

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EACCES, errno.EROFS)
"""What a shared filesystem answers when it is full, broken, restarted, or not meant for us."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call on the seam.

    Attributes:
        number: Its place among all calls, from 1.
        nth: Its place among the calls of its name, from 1.
        name: The method of ``Os``.
        path: What it was called on; for calls on a descriptor, the path that was opened.
    """

    number: int
    nth: int
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process with SIGKILL.

    Attributes:
        share: Before the call; or, for a write, after this share of its bytes.
    """

    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise ``OSError``.

    Attributes:
        errno: Its number.
        after: Do the call all the same, first: a server whose answer was lost reports such failures
            of what it has done.
    """

    errno: int
    after: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Read or write only the first part, and say so; other calls are left alone.

    Attributes:
        share: The part of the bytes asked for.
    """

    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Hang:
    """Wait before the call, as on a mount whose server is gone; then do it.

    Attributes:
        gate: Set it to let the call go on.
        limit_s: A test that forgets to is not left waiting: the call fails with ETIMEDOUT.
    """

    gate: threading.Event
    limit_s: float = 60.0


Fault: TypeAlias = Kill | Fail | Cut | Hang


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """Which calls meet which fault; every condition given must hold.

    Attributes:
        fault: What happens.
        number: The call's number.
        nth: Its number among the calls of its name.
        name: Its name.
        matches: Anything else that a test wants to look at.
        forever: Later calls that fulfil name and matches meet the fault, too: a disk that stays full.
    """

    fault: Fault
    number: int | None = None
    nth: int | None = None
    name: str | None = None
    matches: Callable[[Call], bool] | None = None
    forever: bool = False

    def holds(self, call: Call) -> bool:
        """Whether ``call`` meets the fault."""
        return (
            self._at(self.number, call.number)
            and self._at(self.nth, call.nth)
            and self.name in (None, call.name)
            and (self.matches is None or self.matches(call))
        )

    def _at(self, wanted: int | None, actual: int) -> bool:
        return wanted is None or (actual >= wanted if self.forever else actual == wanted)


def faults_of(name: str, *, errnos: Sequence[int] = ERRNOS) -> list[Fault]:
    """Return every fault that a call of this name can meet, kills first."""
    faults: list[Fault] = [Kill(), *(Fail(number) for number in errnos)]
    if name in ("link", "rename", "unlink", "make_directory", "write_from", "close"):
        faults += [Fail(errno.EIO, after=True)]
    if name == "write_from":
        faults += [Kill(share=0.5), Cut(0.5), Cut(0.9999)]
    if name == "read_into":
        faults += [Cut(0.0), Cut(0.5), Cut(0.9999)]
    return faults


def full_disk(number: int, *, error: int = errno.ENOSPC) -> list[When]:
    """Return the plan of a disk that fills up during call ``number``, a write, and stays full."""
    return [
        When(fault=Cut(0.5), number=number, name="write_from"),
        When(
            fault=Fail(error),
            number=number,
            matches=lambda call: call.name in ("write_from", "link", "make_directory"),
            forever=True,
        ),
    ]


@dataclass(slots=True)
class FaultyOs:
    """An ``Os`` whose calls are counted and, where the plan says so, go wrong.

    Safe for concurrent use.

    Attributes:
        inner: Does the calls.
        plan: What goes wrong; the first entry that holds is carried out.
        calls: Every call so far, in order.
    """

    inner: Os
    plan: Sequence[When] | When = ()
    calls: list[Call] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)
    _paths: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> int:
        """Return how often a method was called."""
        return self._counts[name]

    def reset(self, plan: Sequence[When] | When = ()) -> None:
        """Count from one again, with a new plan; files that are open stay known."""
        with self._lock:
            self.plan = plan
            self.calls.clear()
            self._counts.clear()

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """See ``Os.open``."""
        fd = self._do("open", path, lambda: self.inner.open(path, flags, mode), undo=self._close)
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """See ``Os.close``; the descriptor is closed even if the fault says that it failed."""
        path = self._paths.pop(fd, "")
        fault = self._next("close", path)
        self.inner.close(fd)
        if isinstance(fault, Fail):
            raise OSError(fault.errno, os.strerror(fault.errno), path)

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        """See ``Os.read_into``."""
        fault = self._next("read_into", self._paths.get(fd, ""))
        if isinstance(fault, Fail):
            raise OSError(fault.errno, os.strerror(fault.errno))
        count = self.inner.read_into(fd, target, offset)
        return int(count * fault.share) if isinstance(fault, Cut) else count

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        """See ``Os.write_from``."""
        fault = self._next("write_from", self._paths.get(fd, ""), kill=False)
        if isinstance(fault, Fail) and not fault.after:
            raise OSError(fault.errno, os.strerror(fault.errno))
        share = 1.0 if fault is None or isinstance(fault, Fail) else fault.share
        length = int(len(source) * share)
        if ALIGN_BYTES < length < len(source):
            # A filesystem's own short write of many pages ends between two.
            length = length // ALIGN_BYTES * ALIGN_BYTES
        count = self.inner.write_from(fd, source[:length], offset) if length else 0
        if isinstance(fault, Kill):
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(fault, Fail):
            raise OSError(fault.errno, os.strerror(fault.errno))
        return count

    def sync_data(self, fd: int) -> None:
        """See ``Os.sync_data``."""
        self._do("sync_data", self._paths.get(fd, ""), lambda: self.inner.sync_data(fd))

    def sync(self, fd: int) -> None:
        """See ``Os.sync``."""
        self._do("sync", self._paths.get(fd, ""), lambda: self.inner.sync(fd))

    def link(self, source: str, target: str) -> None:
        """See ``Os.link``."""
        self._do("link", target, lambda: self.inner.link(source, target))

    def rename(self, source: str, target: str) -> None:
        """See ``Os.rename``."""
        self._do("rename", target, lambda: self.inner.rename(source, target))

    def unlink(self, path: str) -> None:
        """See ``Os.unlink``."""
        self._do("unlink", path, lambda: self.inner.unlink(path))

    def stat(self, path: str) -> Stat:
        """See ``Os.stat``."""
        return self._do("stat", path, lambda: self.inner.stat(path))

    def stat_open(self, fd: int) -> Stat:
        """See ``Os.stat_open``."""
        return self._do("stat_open", self._paths.get(fd, ""), lambda: self.inner.stat_open(fd))

    def scan(self, path: str) -> list[Entry]:
        """See ``Os.scan``."""
        return self._do("scan", path, lambda: self.inner.scan(path))

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        """See ``Os.make_directory``."""
        self._do("make_directory", path, lambda: self.inner.make_directory(path, mode))

    def remove_directory(self, path: str) -> None:
        """See ``Os.remove_directory``."""
        self._do("remove_directory", path, lambda: self.inner.remove_directory(path))

    def touch(self, path: str) -> None:
        """See ``Os.touch``."""
        self._do("touch", path, lambda: self.inner.touch(path))

    def set_mode(self, path: str, mode: int) -> None:
        """See ``Os.set_mode``."""
        self._do("set_mode", path, lambda: self.inner.set_mode(path, mode))

    def space(self, path: str) -> Space:
        """See ``Os.space``."""
        return self._do("space", path, lambda: self.inner.space(path))

    def _close(self, fd: int) -> None:
        self.inner.close(fd)

    def _do(
        self,
        name: str,
        path: str,
        call: Callable[[], T],
        *,
        undo: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Do a call that either happens or does not."""
        fault = self._next(name, path)
        if isinstance(fault, Fail):
            if fault.after:
                undo(call())
            raise OSError(fault.errno, os.strerror(fault.errno), path)
        return call()

    def _next(self, name: str, path: str, *, kill: bool = True) -> Kill | Fail | Cut | None:
        """Count a call and return the fault it meets.

        A hang is over on return; a kill happens here unless it is put off.
        """
        with self._lock:
            self._counts[name] += 1
            call = Call(len(self.calls) + 1, self._counts[name], name, path)
            self.calls.append(call)
        plan = (self.plan,) if isinstance(self.plan, When) else self.plan
        fault = next((entry.fault for entry in plan if entry.holds(call)), None)
        if kill and isinstance(fault, Kill):
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(fault, Hang):
            if not fault.gate.wait(fault.limit_s):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)
            return None
        return fault
