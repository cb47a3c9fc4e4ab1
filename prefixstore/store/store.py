"""PrefixStore: composes the tree, the index and the background work of one root.

The tree is the truth, the index a hint (``prefixstore.store.hints``), and every answer about presence
can be overtaken by another host. What is promised: a load that succeeds brought exactly the bytes that
were published under that key in that namespace.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

from prefixstore.clock import Clock, SystemClock
from prefixstore.config import PREFIX_CHUNKS_MAX, StoreConfig
from prefixstore.errors import ClosedError, InvalidError, PrefixStoreError
from prefixstore.index.base import Index
from prefixstore.keys import Fields, Key, NamespaceId
from prefixstore.store.collector import Collector
from prefixstore.store.evictor import Evictor
from prefixstore.store.hints import Hints
from prefixstore.store.keeper import Keeper
from prefixstore.store.opening import open_index
from prefixstore.store.parts import Parts
from prefixstore.store.presence import Presence
from prefixstore.store.reconcile import COMPLETE_MARK, ReconcileReport, reconcile
from prefixstore.store.transfers import BytesLike, Transfers
from prefixstore.store.values import (
    Chunk,
    EvictionReport,
    Loaded,
    NamespaceStats,
    StoreOutcome,
    StoreStats,
)
from prefixstore.tree.blobs import BlobTree, Miss
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import Os
from prefixstore.tree.pins import Pin
from prefixstore.tree.root import Root

__all__ = ["PrefixStore"]

CLOSE_S = 5.0
"""How long closing waits for the background threads: they end between two directories or victims, so a
longer wait is a hung mount, and they are left to die with the process."""


class PrefixStore:
    """One opened root, with or without a namespace to load from and store into.

    Safe for concurrent use by threads. No lock is held around I/O, and locks do not nest: each part has
    a leaf lock of its own (the two exceptions are told in ``Keeper`` and ``PinBook``).

    Nothing here waits for ever by itself, but a system call on a hung mount does: whoever must not hang
    calls from a thread or process that it can give up, as ``prefixstore.ioproc`` does.

    Attributes:
        namespace: The id of the namespace that loads and stores go to; None without one.
    """

    def __init__(self, parts: Parts, *, namespace: NamespaceId | None) -> None:
        """Compose a store; ``open`` is the way to make one."""
        self.namespace = namespace
        self._parts = parts
        self._closed = False
        self._keeper: Keeper | None = None
        if namespace is not None:
            self._keeper = Keeper(parts, namespace=namespace)
        self._evictor = Evictor(parts, namespace=namespace, keeper=self._keeper)
        self._collector = Collector(parts, self._evictor)
        self._presence: Presence | None = None
        self._transfers: Transfers | None = None
        if namespace is not None and self._keeper is not None:
            self._presence = Presence(parts, namespace=namespace, keeper=self._keeper)
            self._transfers = Transfers(
                parts, namespace=namespace, keeper=self._keeper, collector=self._collector
            )

    @classmethod
    def open(
        cls,
        root: str,
        *,
        namespace: Fields | None = None,
        config: StoreConfig | None = None,
        create: bool = True,
        index: Index | Literal["auto"] | None = "auto",
        discard_index: bool = False,
        background: bool = True,
        os_calls: Os | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Open a root.

        Args:
            root: Its absolute path.
            namespace: The fields that decide a chunk's bytes besides its tokens, as JSON values; None
                for a store that only looks after the root.
            config: The settings; the defaults if None.
            create: Make the root and the namespace if they are not there. Never done read-only.
            index: ``"auto"`` for this host's index in ``config.index_dir``, None for none that outlives
                this process, or an index that the store takes over.
            discard_index: Go without this host's index: it is suspected of having killed a process.
            background: Start threads for what need not happen while a request waits. False leaves it
                to ``work``, for tools and tests that want it at a time of their own.
            os_calls: The seam to the filesystem; the machine's if None.
            clock: The clock; the machine's if None.

        Raises:
            InvalidError: The path, the namespace or the settings are wrong.
            UnavailableError: The root cannot be reached now.
            FullError: It cannot be made for want of space.
        """
        config = config or StoreConfig()
        clock = clock or SystemClock()
        create = create and not config.read_only
        opener = Root.create if create else Root.open
        opened = opener(root, os_calls=os_calls, group_shared=config.group_shared)
        identity = opened.namespace(namespace, create=create) if namespace is not None else None
        hint = open_index(
            index, config=config, store_id=opened.store_id, discard=discard_index, clock=clock
        )
        try:
            parts = Parts.build(
                opened, config=config, index=hint, clock=clock, background=background
            )
            store = cls(parts, namespace=identity)
        except BaseException:
            hint.close()
            raise
        if identity is not None:
            store._begin()
        return store

    # Attributes of the root.

    @property
    def root(self) -> Root:
        """The opened root."""
        return self._parts.root

    @property
    def config(self) -> StoreConfig:
        """The settings."""
        return self._parts.config

    @property
    def read_only(self) -> bool:
        """Whether this store only serves."""
        return self._parts.config.read_only

    @property
    def tree(self) -> BlobTree:
        """The truth, for maintenance."""
        return self._parts.tree

    @property
    def hints(self) -> Hints:
        """The index, for maintenance."""
        return self._parts.hints

    # Chunks of the namespace.

    def longest_prefix(self, keys: Sequence[Key]) -> int:
        """Return how many leading keys of one chain are stored, as far as can be told quickly.

        Costs a lookup in the index, and for what it does not know some two dozen stats for thousands of
        keys. An answer is a hint: a later load can miss.

        Args:
            keys: Keys of one KV group, each the parent of the next; at most ``PREFIX_CHUNKS_MAX``.
        """
        if len(keys) > PREFIX_CHUNKS_MAX:
            raise InvalidError(f"a chain has at most {PREFIX_CHUNKS_MAX} keys, not {len(keys)}")
        found = self._lookups().longest_prefix(keys)
        self._parts.counters.add(lookups=1, lookup_keys=len(keys), lookup_found=found)
        return found

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Return for each key, in whatever order, whether it is stored; a hint as above.

        Keys that the index does not know are looked at on disk, a bounded number of them; the others are
        reported missing.
        """
        answers = self._lookups().contains(keys)
        self._parts.counters.add(lookups=1, lookup_keys=len(keys), lookup_found=sum(answers))
        return answers

    def load(self, key: Key, out: Buffer | BytesLike, *, raw_bytes: int) -> Loaded | Miss:
        """Read one chunk, verified and decoded, into the caller's memory.

        Args:
            key: The chunk.
            out: Receives the payload in its first bytes; what it holds after a miss is undefined. A
                ``Buffer`` saves a copy.
            raw_bytes: The payload's exact length.

        Returns:
            What was loaded, or why not: never an exception for what a disk or a mount does.

        Raises:
            InvalidError: ``out`` is too small or cannot be written.
        """
        return self._io().load(key, out, raw_bytes=raw_bytes)

    def store(
        self,
        chunk: Chunk,
        data: Buffer | BytesLike,
        *,
        raw_bytes: int | None = None,
        element_bytes: int = 2,
    ) -> StoreOutcome:
        """Publish one chunk unless it is published already.

        Args:
            chunk: Its place in its prefix.
            data: The payload; a ``Buffer`` saves a copy. The caller may use it again on return.
            raw_bytes: The payload's length; may be left out for bytes, not for a ``Buffer``.
            element_bytes: The size of one KV element, for the codec.

        Returns:
            What became of it: never an exception for what a disk or a mount does. Published means as
            durable as ``config.durability`` says.

        Raises:
            InvalidError: The payload's length is out of range.
        """
        if raw_bytes is None:
            if isinstance(data, Buffer):
                raise InvalidError(
                    "raw_bytes is needed with a Buffer: it may be larger than the chunk"
                )
            raw_bytes = memoryview(data).nbytes
        return self._io().store(chunk, data, raw_bytes=raw_bytes, element_bytes=element_bytes)

    def touch(self, keys: Sequence[Key]) -> None:
        """Note that the chunks of a chain were of use just now: the whole chain moves.

        Returns at once; the index follows within a second, the time on disk, at most once in
        ``config.touch_interval_s`` a chunk, when the background thread gets to it.
        """
        self._check_open()
        if self._keeper is None:
            raise _without_namespace("touch")
        self._keeper.used(keys)

    # Pins.

    def pin(self, name: str, keys: Sequence[Key], *, ends_at_s: int | None = None) -> Pin:
        """Keep chunks of the namespace from eviction, by name and on every host.

        Replaces the pin of that name. Chunks need not be stored yet. Durable on return.

        Args:
            name: Letters, digits, dots, dashes and underscores.
            keys: What to keep; a whole chain, or eviction may take its beginning only after its end.
            ends_at_s: When the pin ends by itself, in seconds since the epoch; None for never.

        Raises:
            InvalidError: The name or the keys cannot be pinned.
            FullError, UnavailableError: The pin was not written.
        """
        self._check_open()
        if self.namespace is None:
            raise _without_namespace("pin")
        now_s = self._parts.membership.now_s()
        pin = Pin(
            name=name,
            namespace=self.namespace,
            keys=tuple(keys),
            created_s=now_s,
            ends_at_s=ends_at_s,
        )
        self._parts.pins.files.write(pin)
        self._count_pins()
        return pin

    def unpin(self, name: str) -> bool:
        """Remove a pin; return whether there was one.

        Raises:
            InvalidError: The name cannot be a pin's.
            UnavailableError: It could not be removed.
        """
        self._check_open()
        removed = self._parts.pins.files.remove(name)
        self._count_pins()
        return removed

    def pins(self) -> list[Pin]:
        """Return all pins of the root, of every namespace, ended ones included.

        Raises:
            InvalidError: A pin's file is damaged.
            UnavailableError: They cannot be read.
        """
        self._check_open()
        return list(self._parts.pins.files)

    # The root as a whole.

    def evict(
        self,
        max_bytes: int | None = None,
        *,
        max_age_s: float | None = None,
        dry_run: bool = False,
        scan: bool = True,
    ) -> EvictionReport:
        """Remove what was not used for longest, of all namespaces and writers, leaves first.

        Args:
            max_bytes: How much may stay; None for the limits in the settings.
            max_age_s: Remove what was not used for so long, too; None for no such limit. Given alone it
                is the only limit.
            dry_run: Tell what would be removed, remove nothing.
            scan: Compare the index with the tree first. False trusts the index, which is right only
                just after a scan.

        Returns:
            What was done; errors are told in it, not raised.

        Raises:
            InvalidError: The store is read-only, or there is no limit at all.
        """
        self._check_open()
        if self.read_only and not dry_run:
            raise InvalidError(f"{self.root.path} was opened read-only: it evicts nothing")
        if max_bytes is None and max_age_s is None and not self._parts.space.limited:
            raise InvalidError(
                "evict needs a limit: max_bytes, max_age_s, or max_bytes or min_free_bytes in the "
                "settings"
            )
        return self._evictor.evict(
            self._target(max_bytes, only_age=max_age_s is not None),
            max_age_s=max_age_s,
            dry_run=dry_run,
            scan=scan,
        )

    def remove(
        self, keys: Sequence[Key], *, namespace: NamespaceId | None = None, dry_run: bool = False
    ) -> EvictionReport:
        """Remove single chunks, whatever they are parents of; pinned ones stay.

        Args:
            keys: What to remove.
            namespace: Where; the store's own namespace if None.
            dry_run: Tell what would be removed, remove nothing.

        Raises:
            InvalidError: The store is read-only, has no namespace, or a pin is damaged.
            UnavailableError: The pins cannot be read.
        """
        self._check_open()
        where = namespace or self.namespace
        if where is None:
            raise _without_namespace("remove")
        if self.read_only and not dry_run:
            raise InvalidError(f"{self.root.path} was opened read-only: it removes nothing")
        return self._evictor.remove(where, keys, dry_run=dry_run)

    def reconcile(self) -> ReconcileReport:
        """Bring the index in line with the tree, now, in this thread; ends early when closed."""
        self._check_open()
        self._flush()
        report = reconcile(self.tree, self.hints, stop=lambda: self._collector.closing)
        self._count_pins()
        return report

    def rebuild(self) -> None:
        """Forget the index and build it anew from the tree, in the background, while serving."""
        self._check_open()
        self._flush()
        self.hints.clear()
        self._collector.want_rebuild()

    def work(self) -> None:
        """Do what waits for the background, now and in this thread: rows, touches, evictions asked for."""
        self._check_open()
        if self._keeper is not None:
            self._keeper.work()
        self._collector.work()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no rebuild or eviction is under way; return whether that came to pass."""
        return self._collector.wait_idle(timeout_s)

    def stats(self) -> StoreStats:
        """Return what the index knows of the root, and what this process has done."""
        self._check_open()
        self._flush()
        totals = self.hints.totals()
        return StoreStats(
            chunks=sum(t.chunks for t in totals.values()),
            file_bytes=sum(t.file_bytes for t in totals.values()),
            namespaces=tuple(
                NamespaceStats(namespace=namespace, chunks=t.chunks, file_bytes=t.file_bytes)
                for namespace, t in sorted(totals.items())
            ),
            complete=self.hints.mark(COMPLETE_MARK) is not None,
            index_kind=self.hints.kind,
            counters=self.counters(),
        )

    def counters(self) -> dict[str, int]:
        """Return what this process has done with the store since it was opened, by name."""
        counters = self._parts.counters.snapshot()
        counters["index_failures"] = self.hints.failures
        return counters

    # Its end.

    def close(self) -> None:
        """Write what waits, end the background threads, let go of the index; bounded, idempotent."""
        if self._closed:
            return
        self._closed = True
        self._collector.close(timeout_s=CLOSE_S)
        if self._keeper is not None:
            self._keeper.close(timeout_s=CLOSE_S)
        self._parts.membership.leave()
        self.hints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    # Inside.

    def _begin(self) -> None:
        """Start the background work that an opened namespace needs."""
        if self.hints.mark(COMPLETE_MARK) is None:
            self._collector.want_rebuild()
        if not self.read_only:
            self._collector.want_reap()

    def _target(self, max_bytes: int | None, *, only_age: bool) -> Callable[[int], int]:
        if max_bytes is not None:
            return lambda _used_bytes: max_bytes
        if only_age:
            return lambda used_bytes: used_bytes
        return lambda used_bytes: self._parts.space.target_bytes(used_bytes, full=False)

    def _flush(self) -> None:
        """Have the index know what this process has done until now."""
        if self._keeper is not None:
            self._keeper.flush()

    def _count_pins(self) -> None:
        """Have the index follow the pin files; eviction reads them again in any case."""
        with contextlib.suppress(PrefixStoreError):
            self.hints.set_pins(self._parts.pins.held(now_s=self._parts.membership.now_s()))

    def _lookups(self) -> Presence:
        self._check_open()
        if self._presence is None:
            raise _without_namespace("look up")
        return self._presence

    def _io(self) -> Transfers:
        self._check_open()
        if self._transfers is None:
            raise _without_namespace("load or store")
        return self._transfers

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store at {self.root.path} was closed")


def _without_namespace(verb: str) -> InvalidError:
    return InvalidError(f"this store was opened without a namespace: it cannot {verb}")
