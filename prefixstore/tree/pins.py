"""Pins: named sets of keys that eviction keeps. The file is the truth; refcounts follow it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId, key_from_hex
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.paths import is_namespace, is_pin_name
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["Pin", "Pins"]

SUFFIX = ".json"


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
        replace_document(path, document, os_calls=self._os, group_shared=self._root.group_shared)

    def remove(self, name: str) -> bool:
        """Remove a pin; returns whether there was one."""
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

        Raises:
            InvalidError: A pin's file is damaged; nothing may be evicted until it is mended.
        """
        for name in self.names():
            if (pin := self.read(name)) is not None:
                yield pin


def pinned_keys(pins: Iterable[Pin], *, now_s: float) -> dict[tuple[NamespaceId, Key], int]:
    """Count for each key how many pins hold it now."""
    counts: dict[tuple[NamespaceId, Key], int] = {}
    for pin in pins:
        if pin.holds(now_s):
            for key in set(pin.keys):
                address = (pin.namespace, key)
                counts[address] = counts.get(address, 0) + 1
    return counts
