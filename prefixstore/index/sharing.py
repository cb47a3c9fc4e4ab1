"""One ``Environment`` for each path in a process, whoever opens it, and none after a fork.

LMDB's locks are POSIX locks, which belong to a process and a file: a second opening would share them
and its close would drop them. So openings of one path are counted, and the last release closes.

The state here is global on purpose. Which files a process has open is a fact about the process, and
LMDB's rule is about exactly that.
"""

import os
import threading
import weakref
from pathlib import Path

from prefixstore.clock import Clock
from prefixstore.index.environment import Environment, open_handle
from prefixstore.index.gate import Gate

__all__ = ["acquire", "is_open", "release"]

CLOSE_WAIT_S = 5.0
"""How long closing waits for a transaction that itself waits for a stopped process."""

_open_lock = threading.Lock()
_open: "dict[Path, Environment]" = {}
_all: "weakref.WeakSet[Environment]" = weakref.WeakSet()
_parked: list[object] = []
_hooked: list[bool] = []


def acquire(path: Path, *, map_bytes: int, map_bytes_max: int, clock: Clock) -> Environment:
    """Open ``path``, or share it if this process has it open; pair with ``release``.

    Raises:
        UnavailableError: It cannot be opened; see ``environment.open_handle``.
    """
    with _open_lock:
        shared = _open.get(path)
        if shared is not None and shared.unusable is None:
            shared.users += 1
            return shared
        if not _hooked:
            os.register_at_fork(after_in_child=_after_fork_in_child)
            _hooked.append(True)
        handle = open_handle(path, map_bytes=map_bytes)
        try:
            opened = Environment(path, handle=handle, clock=clock, map_bytes_max=map_bytes_max)
        except BaseException:
            handle.close()
            raise
        _open[path] = opened
        _all.add(opened)
        return opened


def release(environment: Environment) -> None:
    """Give back one ``acquire``; the last one closes the environment."""
    with _open_lock:
        environment.users -= 1
        if environment.users or environment.pid != os.getpid():
            return
        if _open.get(environment.path) is environment:
            del _open[environment.path]
        waited = environment.writing.acquire(timeout=CLOSE_WAIT_S)
        handle, environment.handle = environment.handle, None
        if not waited:
            # Its thread waits for a process that was stopped in a transaction; the handle must
            # outlive the wait.
            _parked.append(handle)
            return
        with environment.gate.alone():
            if handle is not None:
                handle.close()
        environment.writing.release()


def is_open(path: Path) -> bool:
    """Say whether this process has ``path`` open and in use."""
    with _open_lock:
        shared = _open.get(path)
        return shared is not None and shared.unusable is None


def _after_fork_in_child() -> None:
    """Drop what the parent had open, without touching what the parent still uses.

    Closing an idle handle here is local: LMDB clears only reader slots of the closing process, and
    POSIX locks are the parent's own. A handle that another thread was using at the fork stays as it
    is for ever, because that thread does not exist here.
    """
    global _open_lock  # noqa: PLW0603 - the inherited lock may be held by a thread that is gone
    _open_lock = threading.Lock()
    _open.clear()
    for environment in list(_all):
        idle = environment.writing.acquire(blocking=False) and environment.gate.is_idle()
        handle, environment.handle = environment.handle, None
        if handle is not None and idle:
            handle.close()
        else:
            _parked.append(handle)
        environment.writing, environment.gate = threading.Lock(), Gate()
