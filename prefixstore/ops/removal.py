"""Which chunks go when people name some: a plan first, then the removal, leaves first.

A chunk whose parent is gone cannot be reached any more, so what follows a named chunk goes with it. What
a pin needs stays: the pinned chunks and their ancestors.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from prefixstore.errors import InvalidError
from prefixstore.index.base import Row
from prefixstore.keys import Key, NamespaceId
from prefixstore.store import EvictionReport, PrefixStore
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["RemovalPlan", "carry_out", "find_namespace", "plan_removal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPlan:
    """What would go.

    Attributes:
        chunks: Addresses, children before their parents.
        file_bytes: What that frees.
        pinned_chunks: Chunks that would go, too, if no pin needed them.
        unknown_keys: Keys that were named and are in no namespace.
        whole_namespace: Set when no chunk of it stays: its empty directories go as well.
        shared_chunks: Chunks of erased prompts that other stored prompts share, so that they stay.
        quarantined: Names of files in the quarantine that go as well.
        released_pins: Pins that go first.
    """

    chunks: tuple[tuple[NamespaceId, Key], ...]
    file_bytes: int
    pinned_chunks: int
    unknown_keys: tuple[Key, ...]
    whole_namespace: NamespaceId | None
    shared_chunks: int = 0
    quarantined: tuple[str, ...] = ()
    released_pins: tuple[str, ...] = ()


def find_namespace(root: Root, prefix: str) -> NamespaceId:
    """Return the one namespace whose id begins with ``prefix``.

    Raises:
        InvalidError: There is none, or more than one.
    """
    every = list(root.namespaces())
    found = [namespace for namespace in every if namespace.startswith(prefix.lower())]
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} namespaces begin" if found else "no namespace begins"
    known = ", ".join((found or every)[:8]) or "none"
    raise InvalidError(
        f"{problem} with {prefix!r} in {root.path}; found {known}: see `prefixstore ls {root.path}`"
    )


def plan_removal(
    store: PrefixStore, *, namespace: NamespaceId | None, keys: Iterable[Key] | None
) -> RemovalPlan:
    """Plan to remove a namespace, or named chunks with all that follows them.

    Args:
        store: The root, with its index reconciled.
        namespace: Where to look; None for everywhere.
        keys: The chunks; None for all of ``namespace``.

    Raises:
        InvalidError: Neither a namespace nor keys are named, or the index does not hold all of the root.
        UnavailableError: The index was cleared or failed meanwhile.
    """
    if namespace is None and keys is None:
        raise InvalidError("name a namespace, or keys: removing everything is not offered")
    store.check_whole()
    named = None if keys is None else set(keys)
    rows: list[Row] = []
    pinned = 0
    unknown = set(named or ())
    whole = named is None
    for each in [namespace] if namespace is not None else list(store.root.namespaces()):
        chosen, kept = _choose({row.key: row for row in store.hints.scan(each)}, named)
        rows += chosen
        pinned += kept
        unknown -= {row.key for row in chosen}
        whole = whole and not kept
    store.check_whole()
    rows.sort(key=lambda row: -row.record.end_token)
    return RemovalPlan(
        chunks=tuple((row.namespace, row.key) for row in rows),
        file_bytes=sum(row.record.file_bytes for row in rows),
        pinned_chunks=pinned,
        unknown_keys=tuple(sorted(unknown)) if not pinned else (),
        whole_namespace=namespace if whole else None,
    )


def carry_out(store: PrefixStore, plan: RemovalPlan) -> list[EvictionReport]:
    """Remove what a plan names; returns a report for each namespace.

    Raises:
        UnavailableError: A pin or a quarantined file cannot be removed.
    """
    for name in plan.released_pins:
        store.unpin(name)
    by_namespace: dict[NamespaceId, list[Key]] = defaultdict(list)
    for namespace, key in plan.chunks:
        by_namespace[namespace].append(key)
    reports = [store.remove(keys, namespace=each) for each, keys in by_namespace.items()]
    if plan.whole_namespace is not None and not any(report.errors for report in reports):
        _prune(store.root, plan.whole_namespace)
    for name in plan.quarantined:
        path = f"{store.root.layout.quarantine}/{name}"
        try:
            store.root.os_calls.unlink(path)
        except OSError as error:
            if not is_missing(error):
                raise translate(error, doing="remove", path=path) from error
    return reports


def _choose(rows: dict[Key, Row], named: set[Key] | None) -> tuple[list[Row], int]:
    """Return the rows that go, and how many others a pin keeps."""
    children: dict[Key, list[Key]] = defaultdict(list)
    for key, row in rows.items():
        if row.record.parent is not None:
            children[row.record.parent].append(key)
    doomed: set[Key] = set(rows) if named is None else set()
    queue = [key for key in named or () if key in rows]
    while queue:
        key = queue.pop()
        if key not in doomed:
            doomed.add(key)
            queue += children[key]
    needed: set[Key] = set()
    for key in doomed:
        if rows[key].refs.pins:
            at: Key | None = key
            while at is not None and at in rows and at not in needed:
                needed.add(at)
                at = rows[at].record.parent
    return [rows[key] for key in doomed - needed], len(doomed & needed)


def _prune(root: Root, namespace: NamespaceId) -> None:
    """Remove a namespace's empty directories; its own and the manifest stay.

    An engine that has the namespace open stores into it again: it makes directories for blobs anew, but
    takes a namespace without a directory for a mount that is gone.
    """
    calls, base = root.os_calls, root.layout.namespace(namespace)
    with contextlib.suppress(OSError):
        for outer in [entry.name for entry in calls.scan(base) if entry.is_directory]:
            # The filesystem refuses to remove a directory into which something was stored meanwhile.
            with contextlib.suppress(OSError):
                for inner in [entry.name for entry in calls.scan(f"{base}/{outer}")]:
                    calls.remove_directory(f"{base}/{outer}/{inner}")
                calls.remove_directory(f"{base}/{outer}")
