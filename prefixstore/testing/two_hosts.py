"""Two hosts on one root beside a dict: ``StoreMachine`` where each host sees the other late.

Each host has an index, a clock days from the other's, and a client that believes for ``CACHE_S`` what it has
seen (``prefixstore.testing.hosts``). Its process can die at any call on the filesystem. What must hold
nevertheless, in addition to what ``StoreMachine`` says:

    never wrong KV      however old the view
    nothing is lost     but by eviction and removal, and by them only what they may take
    seen in time        what one host publishes the other finds and loads once its caches have ended
    in use stays        an eviction by age takes nothing that either host has used since
    pins hold           on the host that did not make them, too; they end by the server's clock
    counts converge     to a recount of tree and pin files, on both hosts, after whatever happened

A host may not know of the last ``CACHE_S``: of chunks published meanwhile it may miss, and evict, a parent
whose child it has not seen (a chunk without a parent costs room, not a wrong answer).
"""

import contextlib
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import rule

from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES
from prefixstore.testing.hosts import HostOs, ProcessDiedError, Server
from prefixstore.testing.model import StoreMachine, chunk_places, store_numbers
from prefixstore.tree.pins import Pin

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefixstore.clock import Clock

__all__ = ["TwoHostMachine"]

CACHE_S = 30.0
INTERVAL_S = 5
DAY_S = 86400.0
OFFSETS_S = (-3 * DAY_S, 2 * DAY_S)
SLACK_S = 2
"""Recency counts whole seconds, on both sides of a comparison."""


class HostClock:
    """A host's clock: as fast as the server's, and days from it."""

    def __init__(self, server: Server, *, offset_s: float) -> None:
        self._server = server
        self._offset_s = offset_s

    def wall_s(self) -> float:
        """Return what this host takes for the time."""
        return self._server.now_s() + self._offset_s

    def monotonic_s(self) -> float:
        """Return seconds that never go back."""
        return self._server.clock.monotonic_s()

    def sleep(self, duration_s: float) -> None:
        """Let time pass for all."""
        self._server.clock.advance(duration_s)


class TwoHostMachine(StoreMachine):
    """Two hosts with caches, clocks of their own, and processes that die in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.hosts = [HostOs(self.server, cache_s=CACHE_S) for _ in OFFSETS_S]
        self.changed_at_s = [float("-inf")] * len(self.hosts)
        self.published_by: dict[Key, tuple[int, float]] = {}
        self.used_at_s: dict[Key, float] = {}
        self.pinned_by: dict[str, tuple[int, float]] = {}
        self.ends_at_s: dict[str, float] = {}

    def make(self, number: int) -> PrefixStore:
        """Open the root as one of the hosts."""
        config = StoreConfig(
            index_dir=str(self.directory / f"index-{number}"),
            direct_io="off",
            miss_ttl_s=0,
            touch_interval_s=INTERVAL_S,
        )
        clock: Clock = HostClock(self.server, offset_s=OFFSETS_S[number])
        return PrefixStore.open(
            str(self.directory / "root"),
            namespace=FIELDS,
            config=config,
            clock=clock,
            background=False,
            os_calls=self.hosts[number],
        )

    # What one host knows of the other.

    def advance(self, duration_s: float) -> None:
        """Let time pass for all; pins end meanwhile."""
        self.server.clock.advance(duration_s)
        for name, ends_at_s in list(self.ends_at_s.items()):
            if ends_at_s <= self.server.now_s():
                self.forget_pin(name)

    def settle(self) -> None:
        """Let every cache end, and the background catch up: from then on hosts know the server's time."""
        self.advance(CACHE_S + 1)
        for store in self.stores:
            store.work()

    def sees(self, number: int, key: Key) -> bool:
        """Whether a chunk was published by this host, or long enough ago."""
        by, at_s = self.published_by.get(key, (number, 0.0))
        return by == number or self.server.now_s() - at_s >= CACHE_S

    def is_settled(self, number: int) -> bool:
        """Whether the other host has changed nothing for so long."""
        others = [at_s for by, at_s in enumerate(self.changed_at_s) if by != number]
        return self.server.now_s() - max(others) >= CACHE_S

    def note_changed(self, number: int) -> None:
        """Note when a host changes the root."""
        self.changed_at_s[number] = self.server.now_s()

    def note_published(self, number: int, key: Key) -> None:
        """Note who published a chunk when; to store it is to use it."""
        if key not in self.published:
            self.published_by[key] = (number, self.server.now_s())
            self.used_at_s[key] = self.server.now_s()
            self.note_changed(number)
        super().note_published(number, key)

    def note_pinned(self, number: int, name: str) -> None:
        """Note who made a pin when."""
        self.pinned_by[name] = (number, self.server.now_s())
        self.ends_at_s.pop(name, None)
        self.note_changed(number)

    def forget_pin(self, name: str) -> None:
        """Note that a pin holds nothing any more."""
        self.pins.pop(name, None)
        self.ends_at_s.pop(name, None)
        self.ended.add(name)

    def pinned(self, number: int) -> frozenset[Key]:
        """Return what pins hold that this host has made, or that are old enough to be seen."""
        held: set[Key] = set()
        for name, keys in self.pins.items():
            by, at_s = self.pinned_by[name]
            if by == number or self.server.now_s() - at_s >= CACHE_S:
                held |= keys
        return frozenset(held)

    # More that can happen.

    @rule(number=store_numbers, place=chunk_places, after_s=st.integers(0, 60))
    def use(self, number: int, place: tuple[int, int], after_s: int) -> None:
        """Use a chain after a while, and let the background tell the disk."""
        self.advance(after_s)
        keys = self.chains[place[0]][: place[1] + 1]
        store = self.stores[number]
        assert store.namespace is not None
        known = [record is not None for record in store.hints.get_many(store.namespace, keys)]
        store.touch(keys)
        store.work()
        self.note_changed(number)
        for key, has_row in zip(keys, known, strict=True):
            if has_row and key in self.published:
                self.used_at_s[key] = self.server.now_s()

    @rule(number=store_numbers, age_s=st.integers(20, 200))
    def evict_old(self, number: int, age_s: int) -> None:
        """Evict what nobody used for some time; what either host has used since stays."""
        # Use is told to the disk at most once in the interval, and may be seen as late as caches say.
        late_s = age_s - INTERVAL_S - SLACK_S
        unseen_s = 0 if self.is_settled(number) else CACHE_S
        seen = {key for key in self.published if self.sees(number, key)}
        must_stay = self.held(number, seen)
        self.note_changed(number)
        self.stores[number].evict(max_age_s=age_s)
        gone = self.published - self.in_tree()
        self.published -= gone
        idle_s = {key: self.server.now_s() - self.used_at_s[key] for key in gone}
        young = {key for key in gone if unseen_s <= idle_s[key] < late_s}
        assert young == set(), f"used within {late_s} s, and gone"
        assert not gone & must_stay

    @rule(
        number=store_numbers,
        name=st.sampled_from(["a", "b"]),
        place=chunk_places,
        duration_s=st.integers(1, 100),
    )
    def pin_for_a_while(
        self, number: int, name: str, place: tuple[int, int], duration_s: int
    ) -> None:
        """Pin a chain up to a moment of the server's clock."""
        keys = self.chains[place[0]][: place[1] + 1]
        ends_at_s = int(self.server.now_s()) + duration_s
        self.stores[number].pin(name, keys, ends_at_s=ends_at_s)
        self.pins[name] = frozenset(keys)
        self.note_pinned(number, name)
        self.ends_at_s[name] = ends_at_s

    @rule(
        number=store_numbers,
        calls=st.integers(0, 60),
        what=st.sampled_from(["store_prefix", "evict", "remove", "pin", "work", "reopen"]),
        place=chunk_places,
        chunks=st.integers(0, 8),
    )
    def die_in_the_middle(
        self, number: int, calls: int, what: str, place: tuple[int, int], chunks: int
    ) -> None:
        """Kill a process at some call of what it does; another one takes its place on that host."""
        self.hosts[number].die_after(calls)
        before, pinned = set(self.published), self.pinned(number)
        doing: dict[str, Callable[[], object]] = {
            "store_prefix": lambda: self.store_prefix(number, place),
            "evict": lambda: self.stores[number].evict(chunks * FILE_BYTES),
            "remove": lambda: self.stores[number].remove(self.chains[place[0]][place[1] :]),
            "pin": lambda: self.pin(number, "a", place, 0),
            "work": self.stores[number].work,
            "reopen": self.stores[number].close,
        }
        keys = frozenset(self.chains[place[0]][: place[1] + 1])
        with contextlib.suppress(ProcessDiedError):
            doing[what]()
        self.bury(number)
        self.hosts[number].die_after(None)
        self.note_changed(number)
        self.stores[number] = self.make(number)
        self.take_over(number, what, before, pinned=pinned, keys=keys)

    def take_over(
        self,
        number: int,
        what: str,
        before: set[Key],
        *,
        pinned: frozenset[Key],
        keys: frozenset[Key],
    ) -> None:
        """Have the model follow what a process has done before it died, if it may have done that."""
        there = self.in_tree()
        for key in there - self.published:
            assert what == "store_prefix", f"{key.hex()} came from nowhere"
            self.note_published(number, key)
        gone = before - there
        assert not gone or what in ("evict", "remove"), f"lost by {what}"
        seen = {key for key in before if self.sees(number, key)}
        assert not gone & pinned & seen, "pinned chunks stay"
        self.published = there
        if what == "pin":
            is_there = {pin.name: frozenset(pin.keys) for pin in self.stores_pins()}
            old = self.pins.get("a")
            assert is_there.get("a") in (old, keys), "a pin is whole, or as it was"
            if is_there.get("a") != old:
                self.pins["a"] = keys
                self.note_pinned(number, "a")

    def stores_pins(self) -> list[Pin]:
        """Return the pins as the server has them, past all caches."""
        with PrefixStore.open(str(self.directory / "root"), index=None, background=False) as store:
            return [pin for pin in store.pins() if pin.holds(self.server.now_s())]

    @rule(number=store_numbers)
    def reconcile(self, number: int) -> None:
        """Let the caches end; the counts of a host are then those of the tree and the pin files."""
        self.settle()
        self.check_counts(self.stores[number])
