"""Chunks in and out: what a load and a store do about everything that can go wrong.

load   read and verify ──absent──> drop the row, remember the miss
│ damaged: read once more (a client's cache may be at fault)
└──damaged again──> quarantine, drop the row
store  room? ──> breaker? ──> publish ──> row, forget the miss
│no        │open        │full: pause, ask for eviction
skipped    skipped      └unavailable: pause
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from prefixstore.blob.header import BlobHeader
from prefixstore.blob.reasons import MissReason
from prefixstore.config import RAW_BYTES_MAX
from prefixstore.errors import FullError, InvalidError, PrefixStoreError, UnavailableError
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.collector import Collector
from prefixstore.store.compression import CodecChoice
from prefixstore.store.keeper import Keeper
from prefixstore.store.parts import Parts
from prefixstore.store.reconcile import record_of
from prefixstore.store.values import Chunk, Loaded, SkipReason, StoreOutcome
from prefixstore.tree.blobs import ChunkHead, Miss, Stored
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.quarantine import Quarantine

__all__ = ["BytesLike", "Transfers"]

BytesLike: TypeAlias = bytes | bytearray | memoryview

LOG = logging.getLogger(__name__)

DAMAGED = frozenset(
    {
        MissReason.TORN,
        MissReason.HEADER,
        MissReason.NAMESPACE,
        MissReason.KEY,
        MissReason.DIGEST,
        MissReason.CODEC,
    }
)
"""Reasons that condemn a blob for every reader. A version that is too new and a size that this caller
does not expect do not: other readers may want the blob."""

QUARANTINES_MAX = 16
QUARANTINE_WINDOW_S = 600.0
"""So many blobs in ten minutes are bad luck; more are a sick host, whose memory or network flips bits,
and which must not take sound blobs away from all others. It goes on with misses."""


class Transfers:
    """Loads and stores of one namespace. Safe for concurrent use; holds no lock during I/O."""

    def __init__(
        self, parts: Parts, *, namespace: NamespaceId, keeper: Keeper, collector: Collector
    ) -> None:
        self._namespace = namespace
        self._keeper = keeper
        self._collector = collector
        self._tree = parts.tree
        self._hints = parts.hints
        self._inflight = parts.inflight
        self._missing = parts.missing
        self._present = parts.present
        self._membership = parts.membership
        self._space = parts.space
        self._usage = parts.usage
        self._breaker = parts.breaker
        self._counters = parts.counters
        self._clock = parts.clock
        self._read_only = parts.config.read_only
        self._gone = parts.gone
        self._codec = CodecChoice(parts.config.codec)
        self._quarantine = Quarantine(parts.root, bytes_max=parts.config.quarantine_bytes_max)
        self._staging = threading.local()
        self._quarantined_at_s: deque[float] = deque(maxlen=QUARANTINES_MAX)

    def load(self, key: Key, out: Buffer | BytesLike, *, raw_bytes: int) -> Loaded | Miss:
        """Read one chunk into ``out``; see ``PrefixStore.load``."""
        memory = _memory(out, writable=True)
        buffer = self._buffer(memory, raw_bytes)
        with self._inflight.hold(self._namespace, key):
            found = self._tree.load(self._namespace, key, buffer, raw_bytes=raw_bytes)
            if isinstance(found, Miss) and found.reason in DAMAGED:
                found = self._tree.load(self._namespace, key, buffer, raw_bytes=raw_bytes)
            if isinstance(found, Miss):
                self._missed(key, found)
                return found
        if isinstance(memory, memoryview):
            memory[:raw_bytes] = buffer.payload(raw_bytes)
        self._present.add(key)
        self._keeper.used((key,))
        self._counters.add(loaded=1, loaded_bytes=raw_bytes, read_bytes=found.stored_bytes)
        return Loaded(
            key=key,
            parent=found.parent,
            end_token=found.end_token,
            codec=found.codec,
            raw_bytes=raw_bytes,
            stored_bytes=found.stored_bytes,
        )

    def store(
        self, chunk: Chunk, data: Buffer | BytesLike, *, raw_bytes: int, element_bytes: int
    ) -> StoreOutcome:
        """Publish one chunk; see ``PrefixStore.store``."""
        memory = _memory(data, writable=False)
        buffer = self._buffer(memory, raw_bytes)
        refusal = self._refusal(raw_bytes)
        if refusal is not None:
            return self._skipped(*refusal)
        if isinstance(memory, memoryview):
            buffer.payload(raw_bytes)[:] = memory[:raw_bytes]
        codec = self._codec.choose(buffer.payload(raw_bytes), element_bytes=element_bytes)
        head = ChunkHead(
            key=chunk.key,
            parent=chunk.parent,
            end_token=chunk.end_token,
            element_bytes=element_bytes,
            codec=codec,
        )
        return self._publish(
            chunk.key,
            chunk.parent,
            lambda: self._tree.store(self._namespace, head, buffer, raw_bytes=raw_bytes),
        )

    def adopt(self, image: memoryview, header: BlobHeader) -> StoreOutcome:
        """Publish a blob that was made elsewhere; see ``PrefixStore.adopt``."""
        refusal = self._refusal(len(image))
        if refusal is not None:
            return self._skipped(*refusal)
        return self._publish(header.key, header.parent, lambda: self._tree.adopt(image, header))

    def _publish(self, key: Key, parent: Key | None, write: Callable[[], Stored]) -> StoreOutcome:
        """Have a blob written while nothing evicts it or its parent, and note what came of it."""
        with contextlib.ExitStack() as holds:
            holds.enter_context(self._inflight.hold(self._namespace, key))
            if parent is not None:
                # Its refcount counts this child only once the child has a row.
                holds.enter_context(self._inflight.hold(self._namespace, parent))
            try:
                self._membership.announce()
                stored = write()
            except FullError as error:
                self._breaker.failed()
                if self._space.limited:
                    self._collector.want_eviction(full=True)
                return self._skipped(SkipReason.FULL, str(error))
            except UnavailableError as error:
                self._breaker.failed()
                return self._skipped(SkipReason.UNAVAILABLE, str(error))
            if not stored.existed:
                # That a chunk exists says nothing about whether the root can be written.
                self._breaker.succeeded()
            self._learn(stored.header, existed=stored.existed, file_bytes=stored.file_bytes)
        return StoreOutcome(existed=stored.existed, stored_bytes=stored.header.stored_bytes)

    def _refusal(self, raw_bytes: int) -> tuple[SkipReason, str] | None:
        """Return why nothing should be written now, with a sentence, or None."""
        if self._read_only:
            return SkipReason.READ_ONLY, ""
        self._flush_if_read()
        refusal = self._space.refusal(raw_bytes, namespace=self._namespace)
        if refusal is not None:
            if refusal[0] is not SkipReason.LIMITS:
                self._collector.want_eviction()
            return refusal
        return None if self._breaker.allows() else (SkipReason.PAUSED, "")

    def _skipped(self, reason: SkipReason, detail: str = "") -> StoreOutcome:
        self._counters.add(**{f"skipped_{reason}": 1})
        return StoreOutcome(reason=reason, detail=detail)

    def _learn(self, header: BlobHeader, *, existed: bool, file_bytes: int) -> None:
        """Note a published chunk."""
        key = header.key
        now_s = self._membership.now_s()
        # A blob that existed keeps its time on disk until it is due for a touch.
        record = record_of(header, used_s=now_s, touched_s=0 if existed else now_s)
        self._keeper.learnt([(self._namespace, key, record)])
        self._missing.forget((key,))
        self._present.add(key)
        if existed:
            self._counters.add(existed=1)
            return
        self._space.stored(self._namespace, file_bytes)
        self._usage.stored(self._namespace, file_bytes)
        self._counters.add(
            stored=1,
            stored_bytes=header.stored_bytes,
            compression_saved_bytes=header.raw_bytes - header.stored_bytes,
        )
        self._flush_if_read()
        if self._space.wants_eviction():
            self._collector.want_eviction()

    def _flush_if_read(self) -> None:
        """Have what was stored in the last half second in the index, if that is about to be asked."""
        if self._space.reads_next():
            self._keeper.flush()

    def _missed(self, key: Key, miss: Miss) -> None:
        """Correct what is known after a load that brought nothing."""
        self._counters.add(**{f"missed_{miss.reason}": 1})
        if miss.reason is MissReason.IO:
            return  # The blob may well be there.
        self._present.forget((key,))
        self._missing.add(key)
        self._hints.remove_many(self._namespace, [key])
        self._gone(self._namespace, [key])
        if miss.reason in DAMAGED:
            LOG.warning("prefixstore: damaged blob: %s", miss.detail or miss.reason)
            self._condemn(key, miss.reason)

    def _condemn(self, key: Key, reason: MissReason) -> None:
        """Move a damaged blob out of the way, unless this host finds too many."""
        now_s = self._clock.monotonic_s()
        seen = self._quarantined_at_s
        if self._read_only:
            return
        if len(seen) == QUARANTINES_MAX and now_s - seen[0] < QUARANTINE_WINDOW_S:
            self._counters.add(quarantine_refused=1)
            return
        seen.append(now_s)
        try:
            if self._quarantine.take(self._namespace, key, reason):
                self._counters.add(quarantined=1)
        except PrefixStoreError as error:
            LOG.warning("prefixstore: a damaged blob stays: %s", error)

    def _buffer(self, memory: Buffer | memoryview, raw_bytes: int) -> Buffer:
        """Return the buffer to transfer through: the caller's, or this thread's own.

        Raises:
            InvalidError: The payload does not fit the memory, or no blob.
        """
        fits = memory.capacity_bytes if isinstance(memory, Buffer) else memory.nbytes
        if not 1 <= raw_bytes <= min(fits, RAW_BYTES_MAX):
            raise InvalidError(
                f"a payload of {raw_bytes} bytes: expected 1 to {min(fits, RAW_BYTES_MAX)}, "
                "which is what the memory given and one blob hold"
            )
        if isinstance(memory, Buffer):
            return memory
        staging: Buffer | None = getattr(self._staging, "buffer", None)
        if staging is None or staging.capacity_bytes < raw_bytes:
            staging = Buffer.allocate(raw_bytes)
            self._staging.buffer = staging
        return staging


def _memory(given: Buffer | BytesLike, *, writable: bool) -> Buffer | memoryview:
    """Return the memory as bytes.

    Raises:
        InvalidError: It is not contiguous, or not writable where it has to be.
    """
    if isinstance(given, Buffer):
        return given
    view = memoryview(given)
    if not view.c_contiguous or (writable and view.readonly):
        raise InvalidError("a chunk's memory is contiguous, and writable for a load")
    return view.cast("B")
