"""PrefixStore: composes the tree, the index and the background work of one root.

The tree is the truth, the index a hint (``prefixstore.store.hints``), and every answer about presence
can be overtaken by another host. What is promised: a load that succeeds brought exactly the bytes that
were published under that key in that namespace.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Self

from prefixstore.blob.verify import check_image
from prefixstore.clock import Clock, SystemClock
from prefixstore.config import PREFIX_CHUNKS_MAX, StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.index.base import Index
from prefixstore.keys import Fields, Key, NamespaceId
from prefixstore.store.opening import open_index
from prefixstore.store.parts import Gone, Parts
from prefixstore.store.presence import Presence
from prefixstore.store.reconcile import COMPLETE_MARK
from prefixstore.store.transfers import BytesLike, Transfers
from prefixstore.store.upkeep import Upkeep, without_namespace
from prefixstore.store.values import Chunk, Loaded, StoreOutcome
from prefixstore.tree.blobs import Miss
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import Os
from prefixstore.tree.root import Root

__all__ = ["PrefixStore"]


class PrefixStore(Upkeep):
    """One opened root, with or without a namespace to load from and store into.

    Safe for concurrent use by threads. No lock is held around I/O, and locks do not nest: each part has
    a leaf lock of its own (the exceptions are told in ``Keeper``, ``PinBook`` and ``Membership``).

    Nothing here waits for ever by itself, but a system call on a hung mount does: whoever must not hang
    calls from a thread or process that it can give up, as ``prefixstore.ioproc`` does.
    """

    def __init__(self, parts: Parts, *, namespace: NamespaceId | None) -> None:
        """Compose a store; ``open`` is the way to make one."""
        super().__init__(parts, namespace=namespace)
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
        gone: Callable[[Sequence[Key]], None] | None = None,
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
            discard_index: Start this host's index anew: it is suspected of having killed a process.
            background: Start threads for what need not happen while a request waits. False leaves it
                to ``work``, for tools and tests that want it at a time of their own.
            os_calls: The seam to the filesystem; the machine's if None.
            clock: The clock; the machine's if None.
            gone: Told of chunks of the namespace that this store evicted, or found missing where its
                index promised them. Called by any thread; must neither block nor raise.

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
                opened,
                config=config,
                index=hint,
                clock=clock,
                background=background,
                gone=_of_one(identity, gone),
            )
            store = cls(parts, namespace=identity)
        except BaseException:
            hint.close()
            raise
        if identity is not None:
            store._begin()
        return store

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

        Keys that the index does not know are looked at on disk, from the first on and a bounded number of
        them; the others are reported missing. So give the most useful ones first: of a sliding window, those
        nearest to the end of a prompt.
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

    def adopt(self, image: memoryview) -> StoreOutcome:
        """Publish a blob of the namespace that another store has made, byte for byte, unless it is there.

        Args:
            image: The whole file, in page-aligned memory such as a ``Buffer``'s.

        Returns:
            What became of it, as ``store``.

        Raises:
            CorruptError: It is no sound blob.
            InvalidError: It belongs to another namespace.
        """
        header = check_image(image)
        if header.namespace != self.namespace:
            raise InvalidError(
                f"a blob of namespace {header.namespace} does not belong into {self.namespace}"
            )
        return self._io().adopt(image, header)

    def touch(self, keys: Sequence[Key]) -> None:
        """Note that the chunks of a chain were of use just now: the whole chain moves.

        Returns at once; the index follows within a second, the time on disk, at most once in
        ``config.touch_interval_s`` a chunk, when the background thread gets to it.
        """
        self._check_open()
        if self._keeper is None:
            raise without_namespace("touch")
        self._keeper.used(keys)

    def _begin(self) -> None:
        """Start the background work that an opened namespace needs."""
        # With a quota an engine scans whenever it starts: what others stored since is not in the index.
        if self.hints.mark(COMPLETE_MARK) is None or self._parts.limits.known().bounded:
            self._collector.want_rebuild()
        if not self.read_only:
            self._collector.want_reap()

    def _lookups(self) -> Presence:
        self._check_open()
        if self._presence is None:
            raise without_namespace("look up")
        return self._presence

    def _io(self) -> Transfers:
        self._check_open()
        if self._transfers is None:
            raise without_namespace("load or store")
        return self._transfers


def _of_one(identity: NamespaceId | None, gone: Callable[[Sequence[Key]], None] | None) -> Gone:
    """Tell only of chunks of one namespace."""

    def tell(namespace: NamespaceId, keys: Sequence[Key]) -> None:
        if gone is not None and namespace == identity and keys:
            gone(keys)

    return tell
