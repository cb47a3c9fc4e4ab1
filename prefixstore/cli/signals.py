"""SIGTERM and SIGINT for verbs that stay: the first asks them to end, the second ends them at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stopped_by_signals"]

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that a signal sets; a second one ends the process, whatever hangs in it."""
    stop = threading.Event()

    def end(_number: int, _frame: object) -> None:
        stop.set()
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, end) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
