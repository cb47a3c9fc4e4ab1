"""Pins that end, and are renewed at that very moment: no host and no crash loses one that holds."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.store.pinning import PinBook
from prefixstore.testing.chains import chain, store_chain
from prefixstore.testing.faults import Call, Cut, Fail, FaultyOs, Kill, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.osfs import Entry
from prefixstore.tree.pins import Pin, Pins
from prefixstore.tree.root import Root

OpenStore = Callable[..., PrefixStore]

NAME = "system-prompt"
NOW_S = int(time.time())


def there(root: str, keys: list[Key]) -> int:
    """Count the blobs of a chain in the tree, past every index."""
    names = {path.stem for path in Path(root).glob("ns/*/*/*/*.kv")}
    return sum(key.hex() in names for key in keys)


def renewal(
    store: PrefixStore, keys: list[Key], *, ends_at_s: int | None, name: str = NAME
) -> When:
    """Have another host renew the pin when somebody is about to take its file away; lets the call go on."""
    renewed: list[Call] = []

    def renew(call: Call) -> bool:
        takes = call.name == "unlink" and call.path == store.root.layout.pin(name)
        if not renewed and (takes or (call.name == "rename" and ".moved-" in call.path)):
            renewed.append(call)
            store.pin(name, keys, ends_at_s=ends_at_s)
        return False

    return When(fault=Cut(), matches=renew)


def held_by(root: str) -> int:
    """Count what pins hold now, as a host sees it that has just come."""
    return len(PinBook(Root.open(root)).held(now_s=NOW_S))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_pin_that_is_renewed_while_it_is_removed_stays(
    open_store: OpenStore, root: str, *, has_links: bool
) -> None:
    """One host has read that it had ended; another has pinned its chunks for a day."""
    other, keys = open_store(index=None), chain("p", 10)
    store_chain(other, keys)
    other.pin(NAME, keys, ends_at_s=NOW_S - 10)
    plan = [renewal(other, keys, ends_at_s=NOW_S + 86400)]
    if not has_links:
        plan.append(When(fault=Fail(95), name="link", forever=True))
    store = open_store(index=None, os_calls=FaultyOs(QuickOs(), plan))

    store.evict(10**9)
    names = [pin.name for pin in other.pins()]
    assert (names[0], len(names)) == (NAME, 1 + has_links), (
        "a listing made meanwhile finds the other"
    )
    for _ in range(2):
        store.evict(0)
        assert there(root, keys) == 10
    assert [(pin.name, pin.ends_at_s) for pin in other.pins()] == [(NAME, NOW_S + 86400)]


def test_no_kill_loses_a_pin_that_is_renewed_while_it_is_removed(
    open_store: OpenStore, root: str
) -> None:
    """After a kill at any call it holds, in the eyes of every host, and the next eviction names it as it was."""
    other, keys = open_store(index=None), chain("p", 3)

    def remove(number: int) -> bool:
        """Remove the ended pin in a child that is killed at a call; return whether it was."""
        other.unpin(NAME)
        other.pin(NAME, keys, ends_at_s=NOW_S - 10)
        plan = [renewal(other, keys, ends_at_s=None), When(number=number, fault=Kill())]
        calls = FaultyOs(QuickOs())
        book = PinBook(Root.open(root, os_calls=calls))
        book.held(now_s=NOW_S)
        pid = os.fork()
        if pid == 0:
            calls.reset(plan)
            book.remove_ended(now_s=NOW_S)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    number, renewed, killed = 0, 0, True
    while killed:
        number += 1
        killed = remove(number)
        # Killed before the renewal, it leaves the ended pin; from then on it leaves the new one.
        is_held = held_by(root) == len(keys)
        assert is_held or not renewed
        renewed += is_held
        for _ in range(2 * is_held):
            book = PinBook(Root.open(root))
            book.held(now_s=NOW_S)
            book.remove_ended(now_s=NOW_S)
            assert held_by(root) == len(keys)
            assert NAME in {pin.name for pin in other.pins()}
        assert len(other.pins()) == 1
    assert (number > 10, renewed > 5) == (True, True)


def test_an_ended_pin_of_a_host_that_died_goes_later(open_store: OpenStore, root: str) -> None:
    """What a killed removal has moved aside is removed like any pin that has ended."""
    store, keys = open_store(index=None), chain("p", 3)
    store.pin(NAME, keys, ends_at_s=NOW_S - 10)
    pins = Path(root) / "pins"
    (pins / f"{NAME}.json").rename(pins / f"{NAME}.moved-{'0' * 16}.json")

    store.evict(10**9)
    assert list(pins.iterdir()) == []


def test_a_newer_pin_is_not_replaced_by_one_that_was_moved_aside(
    open_store: OpenStore, root: str
) -> None:
    """Who pinned last is right; an older one that holds goes, and a newer one that lies aside stays."""
    store, keys = open_store(index=None), chain("p", 3)
    pins = Pins(store.root)

    def pin(name: str, *, created_s: int) -> None:
        new = Pin(name="new", namespace=store.namespace, keys=tuple(keys), created_s=created_s)
        pins.write(new)
        (Path(root) / "pins" / "new.json").rename(Path(root) / "pins" / f"{name}.json")

    aside = f"{NAME}.moved-{'1' * 16}"
    for created_s, left in ((1, [NAME]), (3, [NAME, aside])):
        pin(NAME, created_s=2)
        pin(aside, created_s=created_s)
        store.evict(10**9)
        assert [(each.name) for each in store.pins()] == left


def test_unpinning_finds_a_pin_that_lies_aside(open_store: OpenStore, root: str) -> None:
    """A user knows the name that was given, whatever a killed host has done."""
    store, keys = open_store(index=None), chain("p", 3)
    store.pin(NAME, keys)
    store.pin("another", keys)
    pins = Path(root) / "pins"
    (pins / f"{NAME}.json").rename(pins / f"{NAME}.moved-{'0' * 16}.json")

    assert store.unpin(NAME)
    assert [pin.name for pin in store.pins()] == ["another"]


@pytest.mark.parametrize("letters", [1, 104, 105, 128])
def test_a_pin_of_any_name_is_removed_or_renewed(
    open_store: OpenStore, root: str, letters: int
) -> None:
    """The longest name leaves no room for a longer one."""
    other, keys, name = open_store(index=None), chain("p", 3), "a" * letters

    def remove(*plan: When) -> int:
        book = PinBook(Root.open(root, os_calls=FaultyOs(QuickOs(), plan)))
        book.held(now_s=NOW_S)
        return book.remove_ended(now_s=NOW_S)

    other.pin(name, keys, ends_at_s=NOW_S - 10)
    assert (remove(renewal(other, keys, ends_at_s=None, name=name)), remove()) == (0, 0)
    assert [(pin.name, pin.ends_at_s) for pin in other.pins()] == [(name, None)]
    other.pin(name, keys, ends_at_s=NOW_S - 10)
    assert (remove(), other.pins()) == (1, [])


def test_no_pin_is_named_like_one_that_lies_aside(open_store: OpenStore) -> None:
    """The next eviction would give it another name."""
    with pytest.raises(InvalidError, match="moved aside"):
        open_store(index=None).pin(f"{NAME}.moved-{'0' * 16}", chain("p", 3))


@pytest.mark.parametrize("shows", ["the old name", "neither name"])
def test_a_pin_that_moves_while_pins_are_listed_is_seen(
    open_store: OpenStore, root: str, shows: str
) -> None:
    """A listing may tell the name that a file had, or none of it: it is not of one moment."""
    store, keys = open_store(index=None), chain("p", 3)
    store.pin(NAME, keys)

    class Moving(QuickOs):
        def scan(self, path: str) -> list[Entry]:
            found = super().scan(path)
            pin = Path(path) / f"{NAME}.json"
            if path.endswith("/pins") and pin.exists():
                pin.rename(pin.with_name(f"{NAME}.moved-{'0' * 16}.json"))
                return found if shows == "the old name" else []
            return found

    assert len(list(Pins(Root.open(root, os_calls=Moving())))) == 1
