"""The breaker: one trial a pause, longer pauses while it fails, closed by one success."""

import pytest

from prefixstore.store.breaker import Breaker
from prefixstore.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock at rest."""
    return ManualClock()


@pytest.fixture
def breaker(clock: ManualClock) -> Breaker:
    """Return a closed breaker that pauses for 1 to 4 seconds."""
    return Breaker(pause_s=1, pause_max_s=4, clock=clock)


def test_a_closed_breaker_allows_everyone(breaker: Breaker) -> None:
    """Nothing failed yet, so nothing waits."""
    assert [breaker.allows(), breaker.allows()] == [True, True]
    assert not breaker.is_open


def test_an_open_breaker_allows_one_trial_a_pause(breaker: Breaker, clock: ManualClock) -> None:
    """After the pause one caller may try; the next one waits for the outcome."""
    breaker.failed()
    assert not breaker.allows()
    clock.advance(1)

    assert [breaker.allows(), breaker.allows()] == [True, False]


def test_pauses_double_up_to_the_maximum(breaker: Breaker, clock: ManualClock) -> None:
    """1, 2, 4, 4 seconds: bounded, so that healing is always noticed."""
    pauses = []
    breaker.failed()
    for _ in range(4):
        waited_s = 0.0
        while not breaker.allows():
            clock.advance(0.5)
            waited_s += 0.5
        pauses.append(waited_s)
        breaker.failed()

    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_stragglers_do_not_lengthen_the_pause(breaker: Breaker, clock: ManualClock) -> None:
    """Eight writes that fail together count as one failure."""
    for _ in range(8):
        breaker.failed()
    clock.advance(1)

    assert breaker.allows()


def test_a_success_closes_it_and_resets_the_pause(breaker: Breaker, clock: ManualClock) -> None:
    """The next failure starts from the shortest pause again."""
    breaker.failed()
    clock.advance(1)
    breaker.allows()
    breaker.failed()
    breaker.succeeded()
    assert breaker.allows()

    breaker.failed()
    clock.advance(1)
    assert breaker.allows()


def test_retry_soon_skips_the_rest_of_the_pause(breaker: Breaker) -> None:
    """Freed space is used at once."""
    breaker.failed()
    breaker.retry_soon()

    assert breaker.allows()
