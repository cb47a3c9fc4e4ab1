"""Blob files: published whole, loaded verified, on any filesystem that several hosts share.

How a blob gets its name is told in ``prefixstore.tree.publish``.

A load believes nothing but bytes it has checked: length, header, namespace, key, digest, and the codec's
own lengths. Names and ``stat`` are hints, on a shared filesystem more than elsewhere.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xxhash

from prefixstore.blob import codec as codecs
from prefixstore.blob.header import (
    ALIGN_BYTES,
    FILE_BYTES_MAX,
    FORMAT_VERSION,
    HEADER_BYTES,
    BlobHeader,
    encode_header_into,
    file_bytes,
)
from prefixstore.blob.reasons import MissReason
from prefixstore.clock import Clock, SystemClock
from prefixstore.config import RAW_BYTES_MAX, Codec, StoreConfig
from prefixstore.errors import InvalidError, PrefixStoreError, UnavailableError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.buffer import Buffer, ThreadBuffer
from prefixstore.tree.direct import DirectIo
from prefixstore.tree.loading import Loader, Miss
from prefixstore.tree.publish import Publisher
from prefixstore.tree.root import Root
from prefixstore.tree.scan import ScanEntry, scan_blobs
from prefixstore.tree.trouble import is_absence, translate

__all__ = ["BlobTree", "ChunkHead", "Miss", "ScanEntry", "Stored"]

ATTEMPTS = 3
"""To store one key while other writers publish and evict it. Each costs a file written in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHead:
    """What a writer says of a chunk.

    Attributes:
        key: The chunk's key.
        parent: The key one chunk nearer to the start, None for the first.
        end_token: Tokens from the start of the prompt to the chunk's end.
        element_bytes: The size of one KV element, for the shuffle codec.
        codec: How the payload is to be stored; raw where that does not pay.
    """

    key: Key
    parent: Key | None
    end_token: int
    element_bytes: int = 2
    codec: Codec = Codec.RAW


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a store ended.

    Attributes:
        existed: The key was published before, by anyone; nothing was written.
        header: The header of the blob that is there now.
        file_bytes: The length of its file.
    """

    existed: bool
    header: BlobHeader
    file_bytes: int


class BlobTree:
    """The blobs of one root, for one writer. Safe for concurrent use by threads.

    Attributes:
        root: The root.
        writer: This writer's id; the names of its unpublished files begin with it.
    """

    def __init__(
        self,
        root: Root,
        *,
        config: StoreConfig,
        writer: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.root = root
        self.writer = writer or uuid.uuid4().hex
        self._os = root.os_calls
        self._is_read_only = config.read_only
        self._clock = clock or SystemClock()
        self._layout = root.layout
        self._direct = DirectIo(config.direct_io)
        if not config.read_only:
            self._direct.check(root)
        self._scratch = ThreadBuffer()
        self._loader = Loader(self._os, self._layout, direct=self._direct, scratch=self._scratch)
        self._publisher = Publisher(
            root, writer=self.writer, durability=config.durability, direct=self._direct
        )

    @property
    def direct_io(self) -> bool:
        """Whether blobs pass the page cache; no longer, once a call was refused."""
        return self._direct.flag != 0

    # Storing.

    def store(
        self, namespace: NamespaceId, head: ChunkHead, buffer: Buffer, *, raw_bytes: int
    ) -> Stored:
        """Publish the payload in ``buffer`` under the chunk's key, unless a blob is there.

        Args:
            namespace: Where it belongs.
            head: What the chunk is.
            buffer: Holds the payload; its header page and padding are written over. The caller may
                use it again on return.
            raw_bytes: The payload's length.

        Returns:
            Whether it was stored or existed. Visible on return; durable as the policy says.

        Raises:
            FullError: No room; nothing was published.
            UnavailableError: The root cannot be written now; look again before believing it.
            InvalidError: The store is read-only.
        """
        return self._publish(
            namespace, head.key, lambda: self._encode(namespace, head, buffer, raw_bytes=raw_bytes)
        )

    def adopt(self, image: memoryview, header: BlobHeader) -> Stored:
        """Publish a blob's file image as it is, unless a blob is there.

        Args:
            image: The whole file, page-aligned memory; must have passed ``check_image``.
            header: What that returned.

        Raises:
            FullError, UnavailableError, InvalidError: As ``store``.
        """
        return self._publish(header.namespace, header.key, lambda: (image, header))

    def _publish(
        self,
        namespace: NamespaceId,
        key: Key,
        make_image: Callable[[], tuple[memoryview, BlobHeader]],
    ) -> Stored:
        """Publish what ``make_image`` returns, asked for only if no blob is there."""
        if self._is_read_only:
            raise InvalidError(f"{self.root.path} was opened read-only: it stores nothing")
        path = self._layout.blob(namespace, key)
        try:
            there = self._existing(path, namespace, key)
            if isinstance(there, Stored):
                return there
            image, header = make_image()
            length = file_bytes(header.stored_bytes)
            for _ in range(ATTEMPTS):
                if self._publisher.publish(namespace, key, image[:length], replace=there):
                    return Stored(existed=False, header=header, file_bytes=length)
                # Somebody was first. What came may have been torn, or have gone again, since.
                there = self._existing(path, namespace, key)
                if isinstance(there, Stored):
                    return there
        except OSError as error:
            if isinstance(error, PrefixStoreError):
                raise
            raise translate(error, doing="store", path=path) from error
        raise UnavailableError(f"cannot store {path}: it appeared and vanished {ATTEMPTS} times")

    def _existing(self, path: str, namespace: NamespaceId, key: Key) -> Stored | bool:
        """Return the blob that is published, or whether what has its name is to be replaced.

        Damage is replaced, and so is a blob of a version that cannot be read here: the one that takes
        its place can be read by both. What the filesystem fails to show is left alone.

        Raises:
            OSError: It failed.
        """
        try:
            found = self._os.stat(path)
            if not found.is_file:
                return True
            header = self._loader.examine(namespace, key)
        except OSError as error:
            if is_absence(error):
                return False
            raise
        if isinstance(header, Miss) or file_bytes(header.stored_bytes) != found.size_bytes:
            return True
        return Stored(existed=True, header=header, file_bytes=found.size_bytes)

    def _encode(
        self, namespace: NamespaceId, head: ChunkHead, buffer: Buffer, *, raw_bytes: int
    ) -> tuple[memoryview, BlobHeader]:
        """Complete a file image: encoded payload, header before it, zeros behind it."""
        assert 1 <= raw_bytes <= RAW_BYTES_MAX, f"{raw_bytes} bytes are no chunk"
        codec, image = head.codec, buffer.image
        stored = payload = buffer.payload(raw_bytes)
        if codec is not Codec.RAW:
            encoded = codecs.encode(payload, codec=codec, element_bytes=head.element_bytes)
            if file_bytes(len(encoded)) < file_bytes(raw_bytes):
                scratch = self._scratch.get(buffer.capacity_bytes)
                stored, image = scratch.payload(len(encoded)), scratch.image
                stored[:] = encoded
            else:
                codec = Codec.RAW
        header = BlobHeader(
            version=FORMAT_VERSION,
            namespace=namespace,
            key=head.key,
            parent=head.parent,
            end_token=head.end_token,
            codec=codec,
            element_bytes=head.element_bytes,
            raw_bytes=raw_bytes,
            stored_bytes=len(stored),
            payload_digest=xxhash.xxh3_128_digest(stored),
            writer=self.writer,
            created_s=int(self._clock.wall_s()),
        )
        encode_header_into(header, image[:HEADER_BYTES])
        end = HEADER_BYTES + len(stored)
        image[end : file_bytes(len(stored))] = bytes(file_bytes(len(stored)) - end)
        return image, header

    # Loading.

    def load(
        self, namespace: NamespaceId, key: Key, buffer: Buffer, *, raw_bytes: int
    ) -> BlobHeader | Miss:
        """Read a blob into ``buffer`` and verify it.

        Args:
            namespace: Where it belongs.
            key: Its key.
            buffer: Receives the payload, ``buffer.payload(raw_bytes)``; undefined after a miss.
            raw_bytes: The payload's exact length; any other is a miss.
        """
        return self._loader.load(namespace, key, buffer, raw_bytes=raw_bytes)

    def read_image(
        self, namespace: NamespaceId, key: Key, buffer: Buffer
    ) -> tuple[BlobHeader, memoryview] | Miss:
        """Read a blob's file as it is, and verify it as for a load.

        Args:
            namespace: Where it belongs.
            key: Its key.
            buffer: Holds the image until it is used again; a blob that does not fit is a miss.
        """
        return self._loader.read_image(namespace, key, buffer)

    def read_header(self, namespace: NamespaceId, key: Key) -> BlobHeader | Miss:
        """Read and verify a blob's header only; says nothing of its payload or its length."""
        return self._loader.read_header(namespace, key)

    def probe(self, namespace: NamespaceId, key: Key) -> int | None:
        """Return the length of a blob's file by one stat; None if it is absent or surely no blob.

        Raises:
            UnavailableError: The filesystem does not say.
        """
        path = self._layout.blob(namespace, key)
        try:
            found = self._os.stat(path)
        except OSError as error:
            if is_absence(error):
                return None
            raise translate(error, doing="look for", path=path) from error
        whole = HEADER_BYTES < found.size_bytes <= FILE_BYTES_MAX
        if not found.is_file or not whole or found.size_bytes % ALIGN_BYTES:
            return None
        return found.size_bytes

    def is_torn(self, namespace: NamespaceId, key: Key) -> bool:
        """Whether a file under a blob's name has not a blob's length, or not the one its header says.

        The file is opened for it: what a client remembers of a name, or of a length, can be older than a
        blob that another host has put there since.

        Raises:
            UnavailableError: The filesystem does not say.
        """
        header = self.read_header(namespace, key)
        if isinstance(header, Miss):
            return header.reason is MissReason.TORN
        return self.probe(namespace, key) != file_bytes(header.stored_bytes)

    # Keeping.

    def touch(self, namespace: NamespaceId, key: Key) -> bool:
        """Mark a blob as used now, by the file server's clock; returns whether it is there."""
        path = self._layout.blob(namespace, key)
        try:
            self._os.touch(path)
        except OSError as error:
            if is_absence(error):
                return False
            raise translate(error, doing="touch", path=path) from error
        return True

    def unlink(self, namespace: NamespaceId, key: Key) -> bool:
        """Remove a blob; returns whether it was there. Readers that have it open finish."""
        path = self._layout.blob(namespace, key)
        try:
            self._os.unlink(path)
        except OSError as error:
            if is_absence(error):
                return False
            raise translate(error, doing="remove", path=path) from error
        return True

    def scan(
        self,
        namespace: NamespaceId,
        *,
        after: tuple[str, str] = ("", ""),
        pass_over: Callable[[tuple[str, str], PrefixStoreError], None] | None = None,
    ) -> Iterator[tuple[tuple[str, str], list[ScanEntry]]]:
        """Yield the blobs of a namespace directory by directory, in a fixed order.

        Args:
            namespace: Which.
            after: The last directory that an earlier scan has done; those up to it are skipped.
            pass_over: Told of each directory of blobs that cannot be read; the scan goes on behind it. None
                for a scan that ends there.

        Yields:
            A directory's name, fit for ``after``, and its blobs. What vanishes while it is looked at
            is left out, and so is every name that no blob of ours can have.

        Raises:
            UnavailableError: A directory cannot be read.
        """
        return scan_blobs(self._os, self._layout, namespace, after=after, pass_over=pass_over)
