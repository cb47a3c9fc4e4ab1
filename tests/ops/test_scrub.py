"""A scrub that goes on: shared by hosts, taken up where it ended, bounded in what it takes away."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefixstore.clock import SystemClock
from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.ops.scrub import QUARANTINES_MAX, ScrubPass, scrub, watch_scrub
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, store_chain
from prefixstore.testing.faults import FaultyOs
from prefixstore.tree.lease import Lease
from prefixstore.tree.osfs import RealOs

CLOCK = SystemClock()
KEYS = chain("a", 20)
Open = Callable[..., PrefixStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stores:

        def open_it(**options: object) -> PrefixStore:
            config = StoreConfig(direct_io="off", read_only=bool(options.pop("read_only", False)))
            return stores.enter_context(
                PrefixStore.open(
                    str(tmp_path / "root"), config=config, index=None, background=False, **options
                )
            )

        with open_it(namespace=FIELDS) as store:
            store_chain(store, KEYS)
        yield open_it


def damage(store: PrefixStore, count: int) -> None:
    """Flip a bit in the payloads of some blobs."""
    for path in sorted(Path(store.root.path).glob("ns/*/*/*/*.kv"))[:count]:
        content = bytearray(path.read_bytes())
        content[6000] ^= 4
        path.write_bytes(content)


def whole(store: PrefixStore) -> ScrubPass:
    return scrub(store, rate_bytes_s=None, stop=threading.Event(), clock=CLOCK)


class StopAfter(threading.Event):
    """Set once it was asked so often."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self._left = questions

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_a_pass_checks_everything_and_moves_damage(opened: Open) -> None:
    """Damaged blobs are told and moved; the next pass is clean."""
    store = opened()
    damage(store, 2)
    first, second = whole(store), whole(store)

    assert (first.state, first.checked_chunks, first.reasons) == ("done", 20, {"digest": 2})
    assert [finding.quarantined for finding in first.findings] == [True, True]
    assert (second.state, second.checked_chunks, second.is_clean) == ("done", 18, True)


def test_a_pass_goes_on_where_it_was_stopped_on_any_host(opened: Open) -> None:
    """Nothing is read twice, and the sums are those of the whole pass."""
    first = scrub(opened(), rate_bytes_s=None, stop=StopAfter(15), clock=CLOCK)
    calls = FaultyOs(RealOs())
    second = whole(opened(os_calls=calls))
    read = [call.path for call in calls.calls if call.name == "open" and call.path.endswith(".kv")]

    assert (first.state, second.state) == ("stopped", "done")
    assert 0 < first.checked_chunks < 20
    assert second.checked_chunks == 20
    assert len(set(read)) == 20 - first.checked_chunks


def test_one_host_scrubs_at_a_time(opened: Open) -> None:
    """Another finds the lease taken, and does nothing."""
    store, other = opened(), opened()
    lease = Lease(store.root, holder="cd" * 16, clock=CLOCK, directory=store.root.layout.scrub)
    assert lease.acquire()

    assert whole(other).state == "left"
    lease.release()
    assert whole(other).state == "done"


def test_a_host_that_is_followed_stops_and_leaves_the_cursor_alone(opened: Open) -> None:
    """It was paused for so long that another took its turn."""
    store = opened()

    class Followed(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            if self.asked == 5:
                directory = Path(store.root.layout.scrub)
                (directory / f"{2**20:016x}.json").write_text('{"holder": "' + "ef" * 16 + '"}')
                clock.ahead_s = 3600.0
            return False

    class Ahead(SystemClock):
        ahead_s = 0.0

        def monotonic_s(self) -> float:
            return super().monotonic_s() + self.ahead_s

    clock = Ahead()
    found = scrub(store, rate_bytes_s=None, stop=Followed(), clock=clock)

    assert found.state == "stopped"
    assert not (Path(store.root.layout.scrub) / "cursor.json").exists()


def test_a_host_that_finds_much_damage_moves_a_few(opened: Open) -> None:
    """It may be the host that is sick."""
    store = opened()
    damage(store, 20)
    found = whole(store)

    assert found.reasons == {"digest": 20}
    assert sum(finding.quarantined for finding in found.findings) == QUARANTINES_MAX


def test_a_watch_waits_for_the_next_pass_to_be_due(opened: Open) -> None:
    """One pass, then a word on when the next is due; a stop ends the wait."""
    stop = threading.Event()
    seen = []
    for each in watch_scrub(opened(), interval_s=3600, rate_bytes_s=None, stop=stop, clock=CLOCK):
        seen.append(each)
        if each.state == "done":
            stop.wait = lambda _timeout_s: False
        else:
            stop.set()

    assert [each.state for each in seen] == ["done", "waiting"]
    assert 3500 < seen[1].wait_s <= 3600


def test_a_read_only_store_is_not_scrubbed(opened: Open) -> None:
    """It could neither move what is damaged nor say how far it is."""
    with pytest.raises(InvalidError, match="read-only"):
        whole(opened(read_only=True))


def test_a_cursor_that_is_damaged_begins_a_pass_anew(opened: Open) -> None:
    """Nothing depends on it."""
    store = opened()
    whole(store)
    (Path(store.root.layout.scrub) / "cursor.json").write_text("{")

    assert whole(store).checked_chunks == 20
