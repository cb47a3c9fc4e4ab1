"""Remembered misses: believed for their time, bounded in number."""

from prefixstore.keys import Key
from prefixstore.store.misses import MissMemory
from prefixstore.testing.clock import ManualClock


def key(number: int) -> Key:
    """Return the key of chunk ``number``."""
    return Key(number.to_bytes(12, "big"))


def test_a_miss_is_believed_for_its_time_only() -> None:
    """After the time to live the key is unknown again."""
    clock = ManualClock()
    misses = MissMemory(ttl_s=2, keys_max=8, clock=clock)
    misses.add(key(1))
    assert key(1) in misses

    clock.advance(2)
    assert key(1) not in misses


def test_a_repeated_miss_is_believed_anew() -> None:
    """Seeing the key missing again starts its time again."""
    clock = ManualClock()
    misses = MissMemory(ttl_s=2, keys_max=8, clock=clock)
    misses.add(key(1))
    clock.advance(1.5)
    misses.add(key(1))
    clock.advance(1.5)

    assert key(1) in misses


def test_the_oldest_miss_goes_when_the_memory_is_full() -> None:
    """The bound holds and the newest misses survive."""
    misses = MissMemory(ttl_s=100, keys_max=3, clock=ManualClock())
    for number in range(5):
        misses.add(key(number))

    assert [key(number) in misses for number in range(5)] == [False, False, True, True, True]
    assert len(misses) == 3


def test_a_stored_key_is_forgotten() -> None:
    """A chunk that was just published must be found at once."""
    misses = MissMemory(ttl_s=100, keys_max=3, clock=ManualClock())
    misses.add(key(1))
    misses.forget([key(1), key(2)])

    assert key(1) not in misses


def test_a_time_of_zero_remembers_nothing() -> None:
    """With no time to live every lookup probes."""
    misses = MissMemory(ttl_s=0, keys_max=3, clock=ManualClock())
    misses.add(key(1))

    assert key(1) not in misses
