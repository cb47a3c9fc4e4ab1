"""SIGTERM and SIGINT for verbs that stay: the first asks them to end, the second ends them at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stopped_by_signals"]

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that a signal sets; a second one ends the process, whatever hangs in it.

    The handler only writes a byte; a thread sets the event. A handler runs in the main thread between any two
    of its steps, so one that set the event itself would wait for ever for the event's own lock if the main
    thread was just about to wait for the event.
    """
    stop = threading.Event()
    heard, tell = os.pipe()

    def end(_number: int, _frame: object) -> None:
        os.write(tell, b"!")
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)

    def listen() -> None:
        if os.read(heard, 1):
            stop.set()
        os.close(heard)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    before = {number: signal.signal(number, end) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(tell)
        listener.join()
