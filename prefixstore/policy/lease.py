"""Whether the collector's lease may be claimed. Pure: what was seen, and for how long, in; an epoch out.

A lease is a row of **epochs**, each won by one holder, who shows by a **beat** that changes that it goes
on. A challenger does not ask what time a beat says: hosts' clocks differ by days. It asks for how long,
by its own clock, it has been looking at the very same thing.

    nothing seen          -> claim epoch 1
    epoch n was released  -> claim n + 1
    n, its beat changes   -> wait
    n, unchanged for long -> claim n + 1: the holder is dead, or paused and will find out
"""

from dataclasses import dataclass

__all__ = ["Sight", "Watch", "claimable", "observe"]

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """The newest epoch, as a host sees it.

    Attributes:
        epoch: Its number.
        holder: Who won it; empty if that cannot be read.
        beat: Anything that changes while the holder goes on; compared for equality only.
        released: The holder has ended it by itself.
    """

    epoch: int
    holder: str
    beat: float
    released: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a host has been looking at, and since when by its own monotonic clock."""

    sight: Sight | None
    since_s: float


def observe(watch: Watch | None, sight: Sight | None, *, now_s: float) -> Watch:
    """Go on watching: what has not changed keeps the time at which it was first seen.

    >>> seen = Sight(epoch=1, holder="a", beat=5.0, released=False)
    >>> observe(observe(None, seen, now_s=10), seen, now_s=20).since_s
    10
    """
    if watch is not None and watch.sight == sight:
        return watch
    return Watch(sight=sight, since_s=now_s)


def claimable(watch: Watch, *, now_s: float, patience_s: float) -> int | None:
    """Return the epoch that may be claimed now, None while the newest is in use.

    Args:
        watch: From ``observe``, a moment ago.
        now_s: By the clock that ``watch`` was made with.
        patience_s: How long a holder may show no change.
    """
    sight = watch.sight
    if sight is None:
        return FIRST_EPOCH
    if sight.released or now_s - watch.since_s >= patience_s:
        return sight.epoch + 1
    return None
