"""When the collector's lease may be claimed, by the rule's own words."""

import doctest

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.policy import lease as module
from prefixstore.policy.lease import Sight, Watch, claimable, observe

PATIENCE_S = 100.0
HELD = Sight(epoch=7, holder="a", beat=1.0, released=False)

sights = st.one_of(
    st.none(),
    st.builds(
        Sight,
        epoch=st.integers(1, 3),
        holder=st.sampled_from(["a", "b"]),
        beat=st.sampled_from([0.0, -1e9, 1e9]),
        released=st.booleans(),
    ),
)


def test_a_root_without_an_epoch_is_free() -> None:
    """The first epoch is the first host's to claim."""
    assert claimable(Watch(sight=None, since_s=0), now_s=0, patience_s=PATIENCE_S) == 1


def test_an_epoch_that_was_released_is_followed_at_once() -> None:
    """Nobody waits for a holder that has ended it."""
    done = Sight(epoch=7, holder="", beat=0.0, released=True)
    assert claimable(Watch(sight=done, since_s=5), now_s=5, patience_s=PATIENCE_S) == 8


def test_a_holder_is_followed_when_it_was_silent_for_long_enough() -> None:
    """Not a moment before, and not because of what its beat says."""
    watch = Watch(sight=HELD, since_s=50)
    assert claimable(watch, now_s=149.9, patience_s=PATIENCE_S) is None
    assert claimable(watch, now_s=150, patience_s=PATIENCE_S) == 8


def test_a_beat_that_changes_in_any_direction_starts_the_wait_anew() -> None:
    """A server whose clock was set back has a holder that goes on all the same."""
    watch = observe(None, HELD, now_s=0)
    back = Sight(epoch=7, holder="a", beat=-86400.0, released=False)
    watch = observe(watch, back, now_s=99)
    assert claimable(watch, now_s=101, patience_s=PATIENCE_S) is None


@given(st.lists(st.tuples(st.floats(0, 60), sights), min_size=1, max_size=20))
def test_a_watch_says_since_when_nothing_has_changed(
    steps: list[tuple[float, Sight | None]],
) -> None:
    """It equals the time of the first of the equal sights at the end, however they came."""
    watch, now_s, times = None, 0.0, []
    for duration_s, sight in steps:
        now_s += duration_s
        times.append(now_s)
        watch = observe(watch, sight, now_s=now_s)
    at = len(steps) - 1
    while at and steps[at - 1][1] == steps[-1][1]:
        at -= 1
    assert watch == Watch(sight=steps[-1][1], since_s=times[at])


def test_the_examples_in_the_module_hold() -> None:
    """What the documentation shows is what happens."""
    assert doctest.testmod(module).failed == 0
