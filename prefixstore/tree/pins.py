"""Pins: named sets of keys that eviction keeps. The file is the truth; refcounts follow it.

    pins/<name>.json                      a pin
    pins/<name>.moved-<16 digits>.json    one that was moved aside, to be removed or put back

A pin that has ended is removed while another host may give its name to a new one, and no filesystem removes a
name only if it still means what was read. So the file is moved aside first, and read again there. That name
is a pin's like any other: what was moved holds all along, for every host, whoever is killed. If it is not the
pin that has ended, it gets its own name back by a link, and keeps the other until a later removal; thus
a listing meets it under one of them.
"""

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId, key_from_hex
from prefixstore.tree.documents import put_name, read_document, replace_document
from prefixstore.tree.paths import is_namespace, is_pin_name
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["Pin", "Pins", "pinned_keys"]

SUFFIX = ".json"
MOVED_BASE_MAX = 105
"""Letters of a name that is moved aside: more would make the other name longer than a pin's may be. One that is
cut does not say where to put it back, so after a crash it holds under its other name."""
LISTINGS_MAX = 4
"""To meet all pins, two at the least. One may miss a file that is moved while it is made, the next finds it."""

_MOVED = re.compile(r"(.+)\.moved-[0-9a-f]{16}")


class PinDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``pins/<name>.json``."""

    namespace: str
    created_s: int
    ends_at_s: int | None
    keys: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A named set of keys.

    Attributes:
        name: What people call it; also the file's name.
        namespace: Where the keys belong.
        keys: The keys, in the order given.
        created_s: When, in seconds since the epoch by its writer's clock.
        ends_at_s: When it ends by itself, by the same kind of clock; None for never.
    """

    name: str
    namespace: NamespaceId
    keys: tuple[Key, ...]
    created_s: int
    ends_at_s: int | None = None

    def holds(self, now_s: float) -> bool:
        """Whether the pin has not ended."""
        return self.ends_at_s is None or now_s < self.ends_at_s


class Pins:
    """The pins of one root. Safe for concurrent use; the last writer of a name wins."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._os = root.os_calls

    def write(self, pin: Pin) -> None:
        """Make a pin, or replace the one of its name. On the disk on return.

        Raises:
            InvalidError: The name is not one that a pin may have, or there is no key.
            FullError, UnavailableError: It cannot be written.
        """
        if not pin.keys:
            raise InvalidError(f"pin {pin.name!r} names no key: nothing would be kept")
        if _MOVED.fullmatch(pin.name):
            raise InvalidError(
                f"{pin.name!r} is named like a pin that was moved aside: choose another"
            )
        document = PinDocument(
            namespace=pin.namespace,
            created_s=pin.created_s,
            ends_at_s=pin.ends_at_s,
            keys=[key.hex() for key in pin.keys],
        )
        path = self._root.layout.pin(pin.name)
        try:
            self._root.ensure_directory(self._root.layout.pins)
        except OSError as error:
            raise translate(error, doing="make", path=self._root.layout.pins) from error
        replace_document(path, document, os_calls=self._os, mode=self._root.document_mode)

    def remove(self, name: str) -> bool:
        """Remove a pin, where it was moved aside, too; returns whether there was one.

        Raises:
            InvalidError: The name is not one that a pin may have.
            UnavailableError: It could not be removed.
        """
        aside = [other for other in self.names() if _own_name(other) == name]
        # What lies aside first: it may be put back meanwhile.
        return sum(map(self._unlink, (*aside, name))) > 0

    def remove_ended(self, ended: Pin) -> bool:
        """Remove a pin that has ended, unless its name means another pin by now; returns whether it is gone.

        Raises:
            InvalidError: The pin that took its place is damaged; it stays under its other name.
            UnavailableError: It could not be removed.
        """
        if _MOVED.fullmatch(ended.name):
            return self._unlink(ended.name)  # Nobody gives such a name to a new pin.
        aside = f"{ended.name[:MOVED_BASE_MAX]}.moved-{uuid.uuid4().hex[:16]}"
        source, target = self._root.layout.pin(ended.name), self._root.layout.pin(aside)
        try:
            self._os.rename(source, target)
        except OSError as error:
            if is_missing(error):
                return False
            raise translate(error, doing="remove", path=source) from error
        # A crash from here on leaves a pin under the other name: an ended one goes with the next removal, any
        # other holds, and is put back then.
        moved = self.read(aside)
        if moved is not None and replace(moved, name=ended.name) == ended:
            return self._unlink(aside)
        if moved is not None:
            self._put_back(moved, name=ended.name)
            if _own_name(aside) is None:
                # No later removal could tell that it has its own name again: the other goes now.
                self._put_back(moved, name=ended.name)
        return False

    def put_back(self, pin: Pin) -> None:
        """Give a pin that lies aside its own name again, or let it go if that is taken by a newer one.

        Any other pin is left alone.

        Raises:
            InvalidError: The pin that has its name is damaged.
            UnavailableError: It could not be put back.
        """
        name = _own_name(pin.name)
        if name is not None:
            self._put_back(pin, name=name)

    def _put_back(self, moved: Pin, *, name: str) -> None:
        standing = self.read(name)
        if standing is not None:
            # One that is older was put back by another host: both hold until it ends.
            if standing.created_s >= moved.created_s:
                self._unlink(moved.name)
            return
        aside, path = self._root.layout.pin(moved.name), self._root.layout.pin(name)
        try:
            put_name(aside, path, os_calls=self._os)
        except OSError as error:
            if not is_missing(error):  # Another host has put it back.
                raise translate(error, doing="put back", path=path) from error

    def _unlink(self, name: str) -> bool:
        """Remove a file; return whether this did it."""
        path = self._root.layout.pin(name)
        try:
            self._os.unlink(path)
        except OSError as error:
            if is_missing(error):
                return False
            raise translate(error, doing="remove", path=path) from error
        return True

    def read(self, name: str) -> Pin | None:
        """Read one pin; None if there is none.

        Raises:
            InvalidError: Its file is damaged: eviction must not guess what it held.
        """
        path = self._root.layout.pin(name)
        document = read_document(path, PinDocument, os_calls=self._os)
        if document is None:
            return None
        if not is_namespace(document.namespace):
            raise InvalidError(f"{path}: {document.namespace!r:.80} is no namespace id")
        return Pin(
            name=name,
            namespace=NamespaceId(document.namespace),
            keys=tuple(key_from_hex(text) for text in document.keys),
            created_s=document.created_s,
            ends_at_s=document.ends_at_s,
        )

    def names(self) -> list[str]:
        """Return the names of all pins, in order."""
        path = self._root.layout.pins
        try:
            entries = self._os.scan(path)
        except OSError as error:
            if is_missing(error):
                return []
            raise translate(error, doing="list", path=path) from error
        names = (e.name.removesuffix(SUFFIX) for e in entries if e.name.endswith(SUFFIX))
        return sorted(filter(is_pin_name, names))

    def __iter__(self) -> Iterator[Pin]:
        """Read all pins; one removed meanwhile is left out.

        One that is moved aside or put back meanwhile is met under one of its names, or under both.

        Raises:
            InvalidError: A pin's file is damaged; nothing may be evicted until it is mended.
        """
        met: set[str] = set()
        for listing in range(LISTINGS_MAX):
            found = [pin for name in self.names() if name not in met and (pin := self.read(name))]
            if listing and not found:
                return
            met.update(pin.name for pin in found)
            yield from found


def _own_name(name: str) -> str | None:
    """Return the name that a pin had before it was moved aside; None if it was not, or nobody can tell.

    >>> _own_name("system-prompt.moved-0123456789abcdef")
    'system-prompt'
    """
    found = _MOVED.fullmatch(name)
    return found[1] if found and len(found[1]) < MOVED_BASE_MAX else None


def pinned_keys(pins: Iterable[Pin], *, now_s: float) -> dict[tuple[NamespaceId, Key], int]:
    """Count for each key how many pins hold it now."""
    counts: dict[tuple[NamespaceId, Key], int] = {}
    for pin in pins:
        if pin.holds(now_s):
            for key in set(pin.keys):
                address = (pin.namespace, key)
                counts[address] = counts.get(address, 0) + 1
    return counts
