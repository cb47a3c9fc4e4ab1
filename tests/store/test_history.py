"""What was counted outlives the process that counted it, hour by hour."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.keys import NamespaceId
from prefixstore.store import PrefixStore
from prefixstore.store.counters import Counters
from prefixstore.store.history import (
    DAYS_KEPT,
    HOUR_S,
    INTERVAL_S,
    Hour,
    Recorder,
    forget_old_history,
    read_history,
)
from prefixstore.testing.chains import chain, load, store_chain
from prefixstore.testing.clock import ManualClock

OpenStore = Callable[..., PrefixStore]
DAY_S = 24 * HOUR_S
KEYS = chain("a", 4)


@pytest.fixture
def clock() -> ManualClock:
    """Return the clock of all writers of a test."""
    return ManualClock()


def hours(store: PrefixStore, **arguments: int) -> list[Hour]:
    """Return the history, the earliest hour first; all of it is readable."""
    found, errors = read_history(store.root, **arguments)
    assert errors == []
    return sorted(found, key=lambda hour: hour.starts_s)


def counted(store: PrefixStore, name: str) -> list[int]:
    """Return one counter of each hour that has it."""
    return [hour.counts[name] for hour in hours(store) if name in hour.counts]


def test_a_closed_store_leaves_its_counters_behind(
    open_store: OpenStore, clock: ManualClock
) -> None:
    """Who opens the root later reads what was stored and loaded, and in which namespace."""
    first = open_store(clock=clock)
    store_chain(first, KEYS)
    load(first, KEYS[0])
    first.close()
    second = open_store(clock=clock)

    assert counted(second, "stored") == [4]
    assert counted(second, "loaded") == [1]
    assert {hour.namespace for hour in hours(second)} == {second.namespace}


def recorder(store: PrefixStore, clock: ManualClock) -> tuple[Recorder, Counters]:
    """Return a writer's recorder by a clock of ours: a store's own follows the file server's."""
    counters = Counters()
    made = Recorder(
        store.root,
        counters,
        writer="ab" * 16,
        namespace=NamespaceId("cd" * 16),
        enabled=True,
        clock=clock,
        now_s=lambda: int(clock.wall_s()),
    )
    return made, counters


def test_each_hour_has_its_own_sums(open_store: OpenStore, clock: ManualClock) -> None:
    """What is counted after the hour has struck does not add to the hour before."""
    store = open_store(clock=clock)
    made, counters = recorder(store, clock)
    for amount, advance_s in ((1, 0), (2, 0), (5, HOUR_S)):
        clock.advance(advance_s)
        counters.add(loaded=amount)
        made.record(at_once=True)
    begins = [hour.starts_s for hour in hours(store)]

    assert counted(store, "loaded") == [3, 5]
    assert [start % HOUR_S for start in begins] == [0, 0]
    assert begins[1] - begins[0] == HOUR_S


def test_a_new_day_begins_a_new_file(open_store: OpenStore, clock: ManualClock) -> None:
    """The sums of the day before stay as they were."""
    store = open_store(clock=clock)
    made, counters = recorder(store, clock)
    for amount in (1, 2):
        counters.add(loaded=amount)
        made.record(at_once=True)
        clock.advance(DAY_S)

    assert counted(store, "loaded") == [1, 2]
    assert len(list(Path(store.root.layout.history).iterdir())) == 2


def test_nothing_is_written_before_it_is_time(
    open_store: OpenStore, clock: ManualClock, root: str
) -> None:
    """A busy writer replaces its file every few minutes, not with every chunk."""
    store = open_store(clock=clock)
    store_chain(store, KEYS)
    store.work()

    assert not Path(root, "history").exists()


def test_what_could_not_be_written_is_written_later(
    open_store: OpenStore, clock: ManualClock, root: str
) -> None:
    """A directory that is in the way costs time, not figures."""
    store = open_store(clock=clock)
    store_chain(store, KEYS)
    blocker = Path(root, "history")
    blocker.write_text("in the way")
    clock.advance(INTERVAL_S)
    store.work()
    blocker.unlink()
    clock.advance(INTERVAL_S)
    store.work()

    assert counted(store, "stored") == [4]


def test_a_store_that_only_serves_writes_none(
    open_store: OpenStore, clock: ManualClock, root: str
) -> None:
    """Read-only is read-only."""
    with open_store(clock=clock) as store:
        store.store  # noqa: B018 - made the namespace
    reader = open_store(clock=clock, config={"read_only": True})
    load(reader, KEYS[0])
    reader.close()

    assert not Path(root, "history").exists()


def test_a_damaged_file_hides_no_other(open_store: OpenStore, clock: ManualClock) -> None:
    """It is named, with what to do; the others are read."""
    store = open_store(clock=clock)
    store_chain(store, KEYS)
    clock.advance(INTERVAL_S)
    store.work()
    path = Path(store.root.layout.history, f"20260101-{'ab' * 16}.json")
    path.write_text('{"namespace": "x", "hours": {"24": {}}}')
    found, errors = read_history(store.root)

    assert [hour.counts["stored"] for hour in found] == [4]
    assert ["hour of a day" in error for error in errors] == [True]


def test_only_recent_days_are_read_and_kept(open_store: OpenStore, clock: ManualClock) -> None:
    """Days older than a quarter go; a question for the last days opens no older file."""
    store = open_store(clock=clock)
    made, counters = recorder(store, clock)
    counters.add(loaded=1)
    made.record(at_once=True)
    now_s = int(clock.wall_s())

    assert len(hours(store, since_s=now_s - DAY_S)) == 1
    assert hours(store, since_s=now_s + 2 * HOUR_S) == []
    forget_old_history(store.root, server_now_s=now_s + (DAYS_KEPT - 1) * DAY_S)
    assert len(hours(store)) == 1
    forget_old_history(store.root, server_now_s=now_s + (DAYS_KEPT + 2) * DAY_S)
    assert hours(store) == []
