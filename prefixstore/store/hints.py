"""The index as the store uses it: it answers or it knows nothing; that it fails is no error.

A hint is worth no error. When the index fails it is closed and an empty one in memory takes its place:
what it knew is found again by probing, and refcounts come back with the next scan of the tree. The
place stays taken until the store is opened again, so a broken index cannot fail every call anew.
"""

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prefixstore.errors import ClosedError, UnavailableError
from prefixstore.index.base import Address, Entry, Index, Refs, Row, Totals
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId

__all__ = ["LOST", "PARTIAL", "Hints"]

LOG = logging.getLogger(__name__)

PARTIAL = (
    "the root has more chunks than this host's index, which is in memory, has room for: set index_dir "
    "(--index-dir) to a directory on a local disk"
)
LOST = "the index was cleared or failed meanwhile, so what it tells now is not all of the root: try again"
GENERATION_MARK = "generation"
"""Set in an index by the first who asks; gone with everything else once it is cleared or replaced."""

T = TypeVar("T")


class Hints:
    """An ``Index`` that is replaced when it fails. Safe for concurrent use.

    The lock is held only while one index takes the place of another, never around a call into one.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._failures = 0

    @property
    def kind(self) -> str:
        """The class that answers now; ``MemoryIndex`` after a failure."""
        return type(self._index).__name__

    @property
    def failures(self) -> int:
        """How often an index had to be replaced."""
        return self._failures

    @property
    def has_forgotten(self) -> bool:
        """Whether the index that answers now had no room for all it was told."""
        return self._index.has_forgotten

    def generation(self) -> str:
        """Name what the index holds now: another name later says that it was cleared or replaced meanwhile.

        By any process of this host: a repair beside an engine clears the index that both use.
        """
        name = self.mark(GENERATION_MARK)
        if name is None:
            # Two that ask at once may hear of two names: one of them then looks again in vain.
            name = uuid.uuid4().hex
            self.set_mark(GENERATION_MARK, name)
        return name

    def get_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> list[Record | None]:
        """Return what is known of each key."""
        return self._ask(lambda index: index.get_many(namespace, keys))

    def known_prefix(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Return how many leading keys of one chain are known."""
        return self._ask(lambda index: index.known_prefix(namespace, keys))

    def row(self, namespace: NamespaceId, key: Key) -> Row | None:
        """Return the row of ``key`` with its refcounts, or None."""
        return self._ask(lambda index: index.row(namespace, key))

    def refs(self, namespace: NamespaceId, key: Key) -> Refs:
        """Return the refcounts of ``key``."""
        return self._ask(lambda index: index.refs(namespace, key))

    def put_many(self, entries: Sequence[Entry]) -> None:
        """Learn chunks."""
        self._ask(lambda index: index.put_many(entries))

    def remove_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Forget chunks; return how many had a row."""
        return self._ask(lambda index: index.remove_many(namespace, keys))

    def touch_many(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        *,
        used_s: int,
        refresh_s: int | None = None,
    ) -> list[Key]:
        """Raise recency; return the keys whose blob is due for a touch on disk."""
        return self._ask(
            lambda index: index.touch_many(namespace, keys, used_s=used_s, refresh_s=refresh_s)
        )

    def set_pins(self, pins: Mapping[Address, int]) -> None:
        """Make the pins equal to ``pins``."""
        self._ask(lambda index: index.set_pins(pins))

    def oldest_first(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by recency; ends early if the index fails."""
        return self._iterate(lambda index: index.oldest_first(namespace))

    def scan(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by namespace and key; ends early if the index fails."""
        return self._iterate(lambda index: index.scan(namespace))

    def totals(self) -> dict[NamespaceId, Totals]:
        """Return sums for each namespace that has rows."""
        return self._ask(lambda index: index.totals())

    def mark(self, name: str) -> str | None:
        """Return a note, or None."""
        return self._ask(lambda index: index.mark(name))

    def set_mark(self, name: str, value: str | None) -> None:
        """Keep a small note beside the rows."""
        self._ask(lambda index: index.set_mark(name, value))

    def renew(self) -> None:
        """Expect to be told of all chunks anew, those that there was no room for, too."""
        self._ask(lambda index: index.renew())

    def clear(self) -> None:
        """Forget everything."""
        self._ask(lambda index: index.clear())

    def close(self) -> None:
        """Let go of files and memory; idempotent."""
        with contextlib.suppress(UnavailableError):
            self._index.close()

    def _ask(self, question: Callable[[Index], T]) -> T:
        index = self._index
        try:
            return question(index)
        except UnavailableError as error:
            return question(self._replace(index, error))
        except ClosedError:
            # Another thread met the failure while this call was on its way into the index.
            if self._index is index:
                raise
            return question(self._index)

    def _iterate(self, question: Callable[[Index], Iterable[Row]]) -> Iterator[Row]:
        index = self._index
        try:
            yield from question(index)
        except UnavailableError as error:
            self._replace(index, error)
        except ClosedError:
            if self._index is index:
                raise

    def _replace(self, failed: Index, error: UnavailableError) -> Index:
        """Put an empty index in the place of ``failed``, once however many threads met the failure."""
        with self._lock:
            if self._index is failed:
                LOG.warning("the index failed, going on without it: %s", error)
                self._index = MemoryIndex()
                self._failures += 1
                with contextlib.suppress(UnavailableError):
                    failed.close()
            return self._index
