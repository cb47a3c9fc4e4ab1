"""A gate that many pass at once, or one alone: pure threading.

LMDB reads run side by side, and none may run while the map changes its size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate"]


class Gate:
    """Safe for concurrent use; who is inside must not enter again.

    Who asks to be alone goes before those who ask to share after him, so he waits only for those
    who are inside already.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside with others."""
        with self._changed:
            while self._taken:
                self._changed.wait()
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                if not self._sharing:
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside while nobody else is."""
        with self._changed:
            while self._taken:
                self._changed.wait()
            self._taken = True
            while self._sharing:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def is_idle(self) -> bool:
        """Say whether nobody is inside or at the door, without waiting; for the child of a fork."""
        if not self._changed.acquire(blocking=False):
            return False
        try:
            return not self._sharing and not self._taken
        finally:
            self._changed.release()
