"""The wall between our failures and vLLM: no exception of ours crosses it.

A callback that fails is answered with its safe value (a miss, a skipped store), logged with its
traceback at a bounded rate, and counted. Cancellation and interpreter exit pass.
"""

import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from prefixstore.clock import SystemClock

__all__ = ["Guarded", "guarded"]

logger = logging.getLogger("prefixstore")

CLOCK = SystemClock()
LOG_INTERVAL_S = 10.0
"""A failure in a callback recurs with every step; one traceback in this time is enough to act on."""


class Guarded(Protocol):
    """What a class with guarded callbacks provides."""

    def count_failure(self, callback: str) -> None:
        """Count one swallowed failure; must not fail itself."""
        ...


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Guarded)


def guarded(
    otherwise: Callable[[], R],
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Wrap a method so that a failure returns ``otherwise()``."""

    def wrap(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        logged_at_s = -LOG_INTERVAL_S

        @functools.wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal logged_at_s
            try:
                return method(self, *args, **kwargs)
            except Exception:
                self.count_failure(method.__name__)
                now_s = CLOCK.monotonic_s()
                if now_s - logged_at_s >= LOG_INTERVAL_S:
                    logged_at_s = now_s
                    logger.exception("%s failed; the engine serves on without it", method.__name__)
                return otherwise()

        return cast("Callable[Concatenate[S, P], R]", call)

    return wrap
