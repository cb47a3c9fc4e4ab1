"""How chunks leave a root: their rows first, many in one transaction, then their blobs, one by one.

A crash between the two leaves blobs that no index promises: they are still served to whoever probes for
them, and the next reconciliation finds them again. The other order would leave rows without blobs:
promises that a load cannot keep, for which the engine reserves memory in vain.

Chunks come children first and blobs go in that order, so a crash at any point leaves whole prefixes. For
the same reason a blob that cannot be removed keeps all its ancestors, and one in a directory where several
could not is not tried.
"""

import errno
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from prefixstore.errors import PrefixStoreError, UnavailableError
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.parts import Parts
from prefixstore.store.tally import Tally

if TYPE_CHECKING:
    from prefixstore.index.base import Address, Entry

__all__ = ["Doomed", "Remover"]


class Doomed(NamedTuple):
    """A chunk to remove.

    Attributes:
        namespace: Where it is.
        key: Which.
        file_bytes: What that frees.
        record: Its row, to be put back if it stays; None if it has none.
    """

    namespace: NamespaceId
    key: Key
    file_bytes: int
    record: Record | None


class Remover:
    """Removes chunks from one root. Safe for concurrent use."""

    def __init__(self, parts: Parts, *, namespace: NamespaceId | None) -> None:
        self._namespace = namespace
        self._tree = parts.tree
        self._hints = parts.hints
        self._present = parts.present
        self._counters = parts.counters
        self._usage = parts.usage
        self._gone = parts.gone

    def remove(self, chunks: Sequence[Doomed], tally: Tally) -> None:
        """Remove chunks, children before their parents; what stays is told to ``tally``."""
        rows: dict[NamespaceId, list[Key]] = defaultdict(list)
        for chunk in chunks:
            rows[chunk.namespace].append(chunk.key)
        for namespace, keys in rows.items():
            self._hints.remove_many(namespace, keys)
        # A crash here, and between any two blobs below, leaves blobs without rows.
        needed: set[Address] = set()
        back: list[Entry] = []
        gone: dict[NamespaceId, list[Key]] = defaultdict(list)
        for chunk in chunks:
            if (chunk.namespace, chunk.key) in needed:
                tally.kept["has_children"] += 1
            elif not tally.gave_up and self._unlink(chunk, tally):
                gone[chunk.namespace].append(chunk.key)
                continue
            # It is still there, so it is still counted, and so are its ancestors.
            if chunk.record is not None:
                back.append((chunk.namespace, chunk.key, chunk.record))
                if chunk.record.parent is not None:
                    needed.add((chunk.namespace, chunk.record.parent))
        if back:
            self._hints.put_many(back)
        for namespace, keys in gone.items():
            self._gone(namespace, keys)

    def _unlink(self, chunk: Doomed, tally: Tally) -> bool:
        """Remove one blob; return whether it is gone."""
        if tally.failures.cover(chunk.namespace, chunk.key):
            tally.kept["error"] += 1
            return False
        try:
            # "Not there" may come from a server that forgot our handle: it is believed only after
            # another look, or the chunk's parent would go before it.
            was_there = self._tree.unlink(chunk.namespace, chunk.key)
            if not was_there and self._tree.probe(chunk.namespace, chunk.key) is not None:
                path = self._tree.root.layout.blob(chunk.namespace, chunk.key)
                raise UnavailableError(errno.ESTALE, f"{path} is still there after it was removed")
        except PrefixStoreError as error:
            tally.failed(chunk.namespace, chunk.key, error)
            return False
        if chunk.namespace == self._namespace:
            self._present.forget((chunk.key,))
        if was_there:
            tally.removed(chunk.file_bytes)
            self._usage.removed(chunk.namespace, chunk.file_bytes)
            self._counters.add(evicted=1, evicted_bytes=chunk.file_bytes)
        else:
            tally.kept["gone"] += 1
        return True
