"""A collector in the foreground: passes over a root, one after the other, until told to stop.

Does what the collector inside an engine does, with the same lease, for roots whose engines come and go or
must not scan. A root that is away or cannot be read is tried again at the next pass; it is opened anew each
time, so that nothing is held of a mount that has gone.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefixstore.clock import Clock
from prefixstore.errors import FullError, InvalidError, UnavailableError
from prefixstore.store import EvictionReport, PrefixStore

__all__ = ["Pace", "Pass", "watch"]

REST_MAX_S = 1.0
"""The longest rest between two steps: a stop is noticed within it, and the lease beats in time."""
WORK_S = 0.02
"""Work of less than this is gathered before it is rested for: short sleeps last longer than asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over a root.

    Attributes:
        ended_s: When it ended, in seconds since the epoch by this host's clock.
        seconds: How long it took.
        state: ``done``; ``left`` to another host, which evicts right now; or ``failed``.
        report: What went and what stays; None unless it is done.
        error: Why it failed; empty if it did not.
    """

    ended_s: float
    seconds: float
    state: str
    report: EvictionReport | None = None
    error: str = ""


class Pace:
    """Rests between steps, so that work takes no more than a share of the time. For one thread."""

    def __init__(self, share: float, *, stop: threading.Event, clock: Clock) -> None:
        """Begin to work.

        Args:
            share: Of the time, more than 0 and at most 1: with 1 there is no rest.
            stop: Ends a rest, and the work.
            clock: Measures the work.
        """
        assert 0 < share <= 1, f"a share of the time is in (0, 1], not {share}"
        self._rest_for = (1 - share) / share
        self._stop = stop
        self._clock = clock
        self._began_s = clock.monotonic_s()

    def step(self) -> bool:
        """Rest for what was worked since the last rest; return whether to stop."""
        worked_s = self._clock.monotonic_s() - self._began_s
        if self._rest_for and worked_s >= WORK_S:
            self._stop.wait(min(REST_MAX_S, worked_s * self._rest_for))
            self._began_s = self._clock.monotonic_s()
        return self._stop.is_set()


def watch(
    open_store: Callable[[], PrefixStore],
    *,
    interval_s: float,
    share: float,
    max_bytes: int | None,
    max_age_s: float | None,
    stop: threading.Event,
    clock: Clock,
) -> Iterator[Pass]:
    """Make passes until told to stop; yield each as it ends.

    Args:
        open_store: Opens the root for writing, without a namespace.
        interval_s: From the end of a pass to the start of the next.
        share: See ``Pace``.
        max_bytes: How much may stay; None for the root's limits.
        max_age_s: What nobody used for so long goes; None for the root's limit.
        stop: Ends a pass at its next step.
        clock: Tells the time.

    Raises:
        InvalidError: In the first pass: the root is none, or its limits cannot be understood. Later that
            fails one pass: it is being mended, or seen in a line.
    """
    has_passed = False
    while not stop.is_set():
        began_s = clock.monotonic_s()
        report, error = None, ""
        try:
            with open_store() as store:
                pace = Pace(share, stop=stop, clock=clock)
                report = store.collect(max_bytes=max_bytes, max_age_s=max_age_s, stop=pace.step)
        except (UnavailableError, FullError) as caught:
            error = caught.strerror or str(caught)
        except InvalidError as caught:
            if not has_passed:
                raise
            error = str(caught)
        has_passed = has_passed or not error
        state = "failed" if error else "done" if report is not None else "left"
        yield Pass(
            ended_s=clock.wall_s(),
            seconds=clock.monotonic_s() - began_s,
            state=state,
            report=report,
            error=error,
        )
        stop.wait(interval_s)
