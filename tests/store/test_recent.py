"""Keys seen a moment ago: believed for their time, bounded in number."""

from prefixstore.keys import Key
from prefixstore.store.recent import RecentKeys
from prefixstore.testing.clock import ManualClock


def key(number: int) -> Key:
    """Return the key of chunk ``number``."""
    return Key(number.to_bytes(12, "big"))


def test_what_was_seen_is_believed_for_its_time_only() -> None:
    """After the time to live the key is unknown again."""
    clock = ManualClock()
    recent = RecentKeys(ttl_s=2, keys_max=8, clock=clock)
    recent.add(key(1))
    assert key(1) in recent

    clock.advance(2)
    assert key(1) not in recent


def test_a_repeated_sight_is_believed_anew() -> None:
    """Seeing the key again starts its time again."""
    clock = ManualClock()
    recent = RecentKeys(ttl_s=2, keys_max=8, clock=clock)
    recent.add(key(1))
    clock.advance(1.5)
    recent.add(key(1))
    clock.advance(1.5)

    assert key(1) in recent


def test_the_oldest_key_goes_when_the_memory_is_full() -> None:
    """The bound holds and the newest keys survive."""
    recent = RecentKeys(ttl_s=100, keys_max=3, clock=ManualClock())
    for number in range(5):
        recent.add(key(number))

    assert [key(number) in recent for number in range(5)] == [False, False, True, True, True]
    assert len(recent) == 3


def test_a_forgotten_key_is_unknown_at_once() -> None:
    """A chunk that was just published must not be taken for missing."""
    recent = RecentKeys(ttl_s=100, keys_max=3, clock=ManualClock())
    recent.add(key(1))
    recent.forget([key(1), key(2)])

    assert key(1) not in recent


def test_a_time_of_zero_remembers_nothing() -> None:
    """With no time to live every lookup probes."""
    recent = RecentKeys(ttl_s=0, keys_max=3, clock=ManualClock())
    recent.add(key(1))

    assert key(1) not in recent
