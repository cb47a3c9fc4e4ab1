"""Which chunks are stored: index first, then a bounded number of probes of the tree.

    keys ──> index ──known──> is the last known one still there? ──yes──┐
               │                     │ no: another host evicted          │
               │unknown              v                                   v
               └──────────────> gallop along the chain ──found──> rows for the index, later

Eviction takes leaves first, on every host. So when a chain lost something to another host, it lost its
end: one probe of the last known key tells, and a promise that a load could not keep is rare.

Answers are hints. A chunk can vanish between lookup and load, and a hole in a chain shows at load only.
"""

from collections.abc import Sequence

from prefixstore.errors import PrefixStoreError
from prefixstore.index.limits import gallop
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.keeper import Keeper
from prefixstore.store.parts import Parts

__all__ = ["Presence"]

PROBES_MAX = 256
"""Probes of one ``contains``: 100 ms on a slow shared filesystem. What is left unasked is reported
missing, which costs a recompute, not an error. A sliding window is kept every 1,024 tokens or so: with blocks of 16
tokens, 64 probes would end before the one next to the end of a prompt."""


class Presence:
    """Lookups in one namespace. Safe for concurrent use; holds no lock of its own."""

    def __init__(self, parts: Parts, *, namespace: NamespaceId, keeper: Keeper) -> None:
        self._namespace = namespace
        self._keeper = keeper
        self._tree = parts.tree
        self._hints = parts.hints
        self._missing = parts.missing
        self._present = parts.present
        self._counters = parts.counters
        self._gone = parts.gone
        self._now_s = parts.membership.now_s

    def longest_prefix(self, keys: Sequence[Key]) -> int:
        """Return how many leading keys of one chain are stored."""
        known = self._hints.known_prefix(self._namespace, keys)
        try:
            if known and self._look(keys[known - 1]) is None:
                return self._shorter_prefix(keys[:known])
        except PrefixStoreError:
            # A root that does not answer a stat would not answer a load, either.
            return 0
        return known + self._longer_prefix(keys, known)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Return for each key, in whatever order, whether it is stored.

        The first keys are looked for first, and not always the last: the most useful ones go first.
        """
        answers = [record is not None for record in self._hints.get_many(self._namespace, keys)]
        probes = 0
        for at, key in enumerate(keys):
            if answers[at] or key in self._missing:
                continue
            if probes == PROBES_MAX:
                break
            probes += 1
            try:
                size = self._look(key)
            except PrefixStoreError:
                break
            if size is not None:
                answers[at] = True
                self._keeper.learnt([self._entry(key, parent=None, file_bytes=size)])
        return answers

    def _longer_prefix(self, keys: Sequence[Key], known: int) -> int:
        """Return how many chunks follow the ``known`` ones on disk, and have the index learn them."""
        rest = keys[known:]
        sizes: dict[int, int] = {}

        def is_there(at: int) -> bool:
            size = self._look(rest[at])
            if size:
                sizes[at] = size
            return size is not None

        try:
            found = gallop(len(rest), is_there)
        except PrefixStoreError:
            return 0
        if found:
            self._keeper.learnt(self._entries(keys, known, found, sizes))
        return found

    def _shorter_prefix(self, keys: Sequence[Key]) -> int:
        """Look for the end of a chain whose last key is in the index and not on disk."""
        found = gallop(len(keys) - 1, lambda at: self._look(keys[at]) is not None)
        # Rows between the real end and the known one would promise the same again.
        self._hints.remove_many(self._namespace, keys[found:])
        self._gone(self._namespace, keys[found:])
        return found

    def _look(self, key: Key) -> int | None:
        """Return the blob's file bytes, 0 if it was seen a moment ago, None if it is missing.

        Raises:
            PrefixStoreError: Nobody knows; asked again at the next lookup.
        """
        if key in self._present:
            return 0
        if key in self._missing:
            return None
        self._counters.add(probes=1)
        try:
            size = self._tree.probe(self._namespace, key)
        except PrefixStoreError:
            self._counters.add(probes_failed=1)
            raise
        if size is None:
            self._missing.add(key)
        else:
            self._present.add(key)
        return size

    def _entries(
        self, keys: Sequence[Key], known: int, found: int, sizes: dict[int, int]
    ) -> list[tuple[NamespaceId, Key, Record]]:
        return [
            self._entry(
                keys[at],
                parent=keys[at - 1] if at else None,
                file_bytes=sizes.get(at - known, 0),
            )
            for at in range(known, known + found)
        ]

    def _entry(
        self, key: Key, *, parent: Key | None, file_bytes: int
    ) -> tuple[NamespaceId, Key, Record]:
        """Return a row for a chunk that was found; presumed unless its file was seen."""
        record = Record(
            parent=parent,
            file_bytes=file_bytes,
            used_s=self._now_s(),
            presumed=not file_bytes,
        )
        return self._namespace, key, record
