"""The contract of an index: what this host knows about blobs, quickly and without proof.

An index is a hint. It is rebuilt from the blob tree, it may know chunks that another host evicted
and miss chunks that another host stored, and losing it loses nothing but time. What it does promise
is written at each method of ``Index``; ``prefixstore.testing.index_contract`` is the same promise as
tests, and both implementations pass it:

    LmdbIndex    node-local, shared by the processes of one host, survives a restart
    MemoryIndex  one process, bounded, gone at exit: the reference model, and the fallback

Words that matter below:

    row       what is known of one key: its ``Record`` and its refcounts
    children  the number of rows whose record names this key as parent. Derived from the rows, always
              equal to a recount, and kept for keys that have no row themselves, because children are
              often discovered before their parents
    pins      how many pins hold this key. Set from the pin files, kept for keys without a row, too
    recency   ``used_s``, in whole seconds since the epoch, as the caller says; no clock is read here

The index counts neither transfers in flight (the store does) nor children that it does not know.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import Candidate

__all__ = [
    "MARK_NAME_CHARS_MAX",
    "MARK_VALUE_CHARS_MAX",
    "Address",
    "Entry",
    "Index",
    "Refs",
    "Row",
    "Totals",
]

MARK_NAME_CHARS_MAX = 64
"""A mark's name is a word of our own code."""
MARK_VALUE_CHARS_MAX = 4096
"""Room for a scan cursor or a small JSON document; marks are no place for data."""

Address: TypeAlias = tuple[NamespaceId, Key]
"""Where a chunk stands: keys are unique within a namespace only."""

Entry: TypeAlias = tuple[NamespaceId, Key, Record]
"""One row to write."""


class Refs(NamedTuple):
    """Why a chunk must stay; evictable is (0, 0)."""

    children: int
    pins: int


class Row(NamedTuple):
    """One row as it stood when it was read."""

    namespace: NamespaceId
    key: Key
    record: Record
    refs: Refs

    def candidate(self) -> Candidate:
        """Return the row as eviction looks at it."""
        return Candidate(
            namespace=self.namespace,
            key=self.key,
            parent=self.record.parent,
            file_bytes=self.record.file_bytes,
            used_s=self.record.used_s,
            end_token=self.record.end_token,
            children=self.refs.children,
            pins=self.refs.pins,
        )


class Totals(NamedTuple):
    """Sums over the rows of one namespace.

    Attributes:
        chunks: Rows, presumed ones included.
        file_bytes: Sum of the known sizes; presumed rows add nothing.
        presumed: Rows whose record is presumed.
    """

    chunks: int
    file_bytes: int
    presumed: int


class Index(Protocol):
    """What the store asks of an index.

    Safe for concurrent use by threads. Each call is bounded in memory by its arguments; iterators
    read in batches and hold no transaction between two items. Calls of many keys apply in batches of
    a few thousand, each batch whole or not at all, in order; refcounts are right after each batch.

    Raises, from every method:
        UnavailableError: The index cannot be used now, here, or any more; go on without it.
        ClosedError: After ``close()``.
        InvalidError: An argument is out of its range; nothing of its batch was written.
    """

    @property
    def has_forgotten(self) -> bool:
        """Whether rows were dropped for want of room since the index was last empty or renewed.

        With a row goes all that it follows, known then or later: an index that has room for some rows only
        counts all children of those.
        """
        ...

    def get_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> list[Record | None]:
        """Return what is known of each key, in the order of ``keys``; None where nothing is.

        All answers are of one moment. Changes nothing, recency neither.
        """
        ...

    def known_prefix(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Return how many leading keys of one chain are known, by galloping.

        Looks at some two dozen of thousands of keys: the answer ``n`` means that key ``n - 1`` has a
        row and key ``n`` has none. A hole before it goes unseen and costs one miss at load. In
        exchange the scheduler's thread makes a bounded number of calls that let go of the
        interpreter lock.
        """
        ...

    def row(self, namespace: NamespaceId, key: Key) -> Row | None:
        """Return the row of ``key`` with its refcounts, or None."""
        ...

    def refs(self, namespace: NamespaceId, key: Key) -> Refs:
        """Return the refcounts of ``key``, whether or not it has a row."""
        ...

    def put_many(self, entries: Iterable[Entry]) -> None:
        """Learn chunks; a key that has a row keeps what the new record does not know.

        See ``records.merge``: sizes, depth and parent known once stay known, recency never goes
        back, and only a record that is not presumed makes a row certain. Idempotent.
        """
        ...

    def remove_many(self, namespace: NamespaceId, keys: Sequence[Key]) -> int:
        """Forget chunks and return how many had a row; their parents lose a child each.

        Children and pins of a removed key stay counted. Idempotent.
        """
        ...

    def touch_many(
        self,
        namespace: NamespaceId,
        keys: Sequence[Key],
        *,
        used_s: int,
        refresh_s: int | None = None,
    ) -> list[Key]:
        """Raise the recency of the keys that have a row to ``used_s``; never lower it.

        Args:
            namespace: Where the keys stand.
            keys: Any keys; those without a row are skipped.
            used_s: Whole seconds since the epoch.
            refresh_s: If given, choose the keys whose blob was last touched on disk at least this
                long ago, and note ``used_s`` as their new time. The choice is made in the
                transaction that notes it, so of several processes one is told.

        Returns:
            The keys that the caller should now touch on disk; empty if ``refresh_s`` is None.
        """
        ...

    def set_pins(self, pins: Mapping[Address, int]) -> None:
        """Make the pins equal to ``pins``, as read from all pin files; keys left out lose theirs.

        Adds and raises first, then lowers and drops: a key pinned before and after is pinned at
        every moment between.
        """
        ...

    def oldest_first(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows by recency, oldest first; of one second, the deepest (``end_token``) first.

        Each row is as of its batch. A row that changes meanwhile may come twice or not at all; the
        iteration ends nevertheless, because it starts from each place in the order once.
        """
        ...

    def scan(self, namespace: NamespaceId | None = None) -> Iterator[Row]:
        """Yield rows in the order of namespace and key; batches as in ``oldest_first``."""
        ...

    def totals(self) -> dict[NamespaceId, Totals]:
        """Return sums for each namespace that has rows, without reading the rows."""
        ...

    def mark(self, name: str) -> str | None:
        """Return a note set by ``set_mark`` (that a rebuild finished, a scan's cursor), or None."""
        ...

    def set_mark(self, name: str, value: str | None) -> None:
        """Keep a small note beside the rows; None removes it. It shares the index's fate."""
        ...

    def renew(self) -> None:
        """Expect to be told of all chunks anew, those that there was no room for, too; rows stay."""
        ...

    def clear(self) -> None:
        """Forget everything, pins and marks included."""
        ...

    def close(self) -> None:
        """Let go of files and memory; idempotent."""
        ...
