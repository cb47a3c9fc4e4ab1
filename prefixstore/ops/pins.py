"""What a pin is made of, and what pins hold, as plain values for people and scripts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId
from prefixstore.store import PrefixStore

__all__ = ["PinLine", "find_keys", "keys_of_namespace", "pin_lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinLine:
    """One pin.

    Attributes:
        name: Its name.
        namespace: Where its keys belong.
        keys: How many chunks it names.
        stored_chunks: How many of them are stored now.
        stored_bytes: What their files take. A chunk that two pins hold counts in both.
        created_s: When it was made, in seconds since the epoch.
        ends_at_s: When it ends by itself; None for never.
        holds: Whether it has not ended.
    """

    name: str
    namespace: NamespaceId
    keys: int
    stored_chunks: int
    stored_bytes: int
    created_s: int
    ends_at_s: int | None
    holds: bool


def pin_lines(store: PrefixStore, *, now_s: float) -> list[PinLine]:
    """Return the pins of a root whose index is reconciled, by name.

    Raises:
        InvalidError: A pin's file is damaged.
        UnavailableError: The pins cannot be read.
    """
    lines = []
    for pin in store.pins():
        keys = tuple(dict.fromkeys(pin.keys))
        found = [row for row in store.hints.get_many(pin.namespace, keys) if row is not None]
        lines.append(
            PinLine(
                name=pin.name,
                namespace=pin.namespace,
                keys=len(keys),
                stored_chunks=len(found),
                stored_bytes=sum(record.file_bytes for record in found),
                created_s=pin.created_s,
                ends_at_s=pin.ends_at_s,
                holds=pin.holds(now_s),
            )
        )
    return lines


def keys_of_namespace(store: PrefixStore, namespace: NamespaceId) -> list[Key]:
    """Return the keys of all chunks that a namespace holds now; the index is reconciled.

    Raises:
        InvalidError: It holds none, or the index does not hold all of the root.
        UnavailableError: The index was cleared or failed meanwhile.
    """
    keys = [row.key for row in store.hints.scan(namespace)]
    store.check_whole()
    if not keys:
        raise InvalidError(
            f"namespace {namespace} of {store.root.path} holds no chunk: nothing would be pinned"
        )
    return keys


def find_keys(
    store: PrefixStore, keys: Sequence[Key], *, among: Iterable[NamespaceId] | None = None
) -> NamespaceId:
    """Return the one namespace that holds some of ``keys``; the index is reconciled.

    Args:
        store: The root.
        keys: What to look for.
        among: The namespaces to look in; None for all.

    Raises:
        InvalidError: No namespace holds any of them, or more than one does.
    """
    every = store.root.namespaces() if among is None else among
    found = [
        namespace
        for namespace in every
        if any(record is not None for record in store.hints.get_many(namespace, keys))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidError(
            f"namespaces {', '.join(found)} all hold these chunks: choose one by --namespace"
        )
    raise InvalidError(
        f"no namespace of {store.root.path} holds any of these {len(keys)} chunks: to pin them "
        "before they are stored, name their --namespace"
    )
