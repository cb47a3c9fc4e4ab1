"""Blob files: published whole, loaded verified, on any filesystem that several hosts share.

How a blob gets its name is told in ``prefixstore.tree.publish``.

A load believes nothing but bytes it has checked: length, header, namespace, key, digest, and the codec's
own lengths. Names and ``stat`` are hints, on a shared filesystem more than elsewhere.
"""

import contextlib
import mmap
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from prefixstore.blob import codec as codecs
from prefixstore.blob.header import (
    ALIGN_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    BlobHeader,
    decode_header,
    encode_header_into,
    file_bytes,
)
from prefixstore.blob.verify import MissReason, check_header, check_payload
from prefixstore.clock import Clock, SystemClock
from prefixstore.config import RAW_BYTES_MAX, Codec, StoreConfig
from prefixstore.errors import CorruptError, InvalidError, PrefixStoreError, UnavailableError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import FILE_MODE, Os
from prefixstore.tree.paths import blob_key, is_fan
from prefixstore.tree.publish import Publisher
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_absence, is_missing, translate

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


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a load brought nothing; never an exception, always safe to compute the chunk again."""

    reason: MissReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A blob as its directory shows it, unverified."""

    namespace: NamespaceId
    key: Key
    file_bytes: int
    modified_s: float


class BlobTree:
    """The blobs of one root, for one writer. Safe for concurrent use by threads.

    Attributes:
        root: The root.
        writer: This writer's id; its temporary files lie in a directory of that name.
        direct_io: Whether blobs pass the page cache.
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
        self._os: Os = root.os_calls
        self._config = config
        self._clock = clock or SystemClock()
        self._layout = root.layout
        self._per_thread = threading.local()
        self.direct_io = self._choose_direct_io()
        self._publisher = Publisher(
            root,
            temporary=self._layout.temporary(self.writer),
            durability=config.durability,
            direct_io=self.direct_io,
        )

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
        if self._config.read_only:
            raise InvalidError(f"{self.root.path} was opened read-only: it stores nothing")
        path = self._layout.blob(namespace, head.key)
        try:
            there = self._existing(path, namespace, head.key)
            if isinstance(there, Stored):
                return there
            image, header = self._encode(namespace, head, buffer, raw_bytes=raw_bytes)
            length = file_bytes(header.stored_bytes)
            for _ in range(ATTEMPTS):
                if self._publisher.publish(path, image[:length], replace=there):
                    return Stored(existed=False, header=header, file_bytes=length)
                # Somebody was first. What came may have been torn, or have gone again, since.
                there = self._existing(path, namespace, head.key)
                if isinstance(there, Stored):
                    return there
        except OSError as error:
            if isinstance(error, PrefixStoreError):
                raise
            raise translate(error, doing="store", path=path) from error
        raise UnavailableError(f"cannot store {path}: it appeared and vanished {ATTEMPTS} times")

    def _existing(self, path: str, namespace: NamespaceId, key: Key) -> Stored | bool:
        """Return the blob that is published, or whether a torn one is in its place."""
        try:
            size = self._os.stat(path).size_bytes
        except OSError as error:
            if is_absence(error):
                return False
            raise
        found = self.read_header(namespace, key)
        if isinstance(found, Miss):
            return found.reason is not MissReason.ABSENT
        if file_bytes(found.stored_bytes) != size:
            return True
        return Stored(existed=True, header=found, file_bytes=size)

    def _encode(
        self, namespace: NamespaceId, head: ChunkHead, buffer: Buffer, *, raw_bytes: int
    ) -> tuple[memoryview, BlobHeader]:
        """Complete a file image: encoded payload, header before it, zeros behind it."""
        codec, image = head.codec, buffer.image
        stored = payload = buffer.payload(raw_bytes)
        if codec is not Codec.RAW:
            encoded = codecs.encode(payload, codec=codec, element_bytes=head.element_bytes)
            if file_bytes(len(encoded)) < file_bytes(raw_bytes):
                scratch = self._scratch(buffer.capacity_bytes)
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
        path = self._layout.blob(namespace, key)
        try:
            length = self._read_file(path, buffer, raw_bytes=raw_bytes)
        except OSError as error:
            return self._missed(error, path)
        header = self._verified(buffer, length, namespace, key, raw_bytes=raw_bytes)
        if isinstance(header, Miss) or header.codec is Codec.RAW:
            return header
        scratch = self._scratch(buffer.capacity_bytes)
        stored = scratch.payload(header.stored_bytes)
        stored[:] = buffer.payload(header.stored_bytes)
        try:
            codecs.decode_into(
                stored,
                buffer.payload(raw_bytes),
                codec=header.codec,
                element_bytes=header.element_bytes,
            )
        except CorruptError as error:
            return Miss(MissReason.CODEC, f"{path}: {error}")
        return header

    def _read_file(self, path: str, buffer: Buffer, *, raw_bytes: int) -> int:
        """Read a whole file into the image; returns its length, or more than any blob's."""
        limit = file_bytes(raw_bytes) + ALIGN_BYTES
        assert limit <= len(buffer.image), f"{raw_bytes} bytes, {buffer.capacity_bytes} fit"
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct_io else 0)
        fd = self._os.open(path, flags)
        try:
            done = 0
            while done < limit:
                count = self._os.read_into(fd, buffer.image[done:limit], done)
                done += count
                # A read that ends where a whole blob ends is not tried again: more could only be a
                # foreign file's tail. Past the page cache, one that ends inside a page has met the
                # end of the file, and there is no reading on from there.
                if count == 0 or self._is_whole(buffer, done, raw_bytes):
                    break
                if self.direct_io and done % ALIGN_BYTES:
                    break
            return done
        finally:
            with contextlib.suppress(OSError):  # Nothing was written: closing can lose nothing.
                self._os.close(fd)

    @staticmethod
    def _is_whole(buffer: Buffer, done: int, raw_bytes: int) -> bool:
        """Whether what was read is as long as its header says, or as a raw blob is."""
        if done == file_bytes(raw_bytes):
            return True
        if done < HEADER_BYTES:
            return False
        try:
            header = decode_header(buffer.image[:HEADER_BYTES])
        except CorruptError:
            return True
        return file_bytes(header.stored_bytes) == done

    def _verified(
        self, buffer: Buffer, length: int, namespace: NamespaceId, key: Key, *, raw_bytes: int
    ) -> BlobHeader | Miss:
        path = self._layout.blob(namespace, key)
        if length < HEADER_BYTES:
            return Miss(MissReason.TORN, f"{path} has {length} bytes, a header has {HEADER_BYTES}")
        try:
            header = decode_header(buffer.image[:HEADER_BYTES])
        except CorruptError as error:
            return Miss(MissReason(error.reason), f"{path}: {error}")
        reason = check_header(
            header, namespace=namespace, key=key, raw_bytes=raw_bytes, file_bytes=length
        )
        if reason is None:
            reason = check_payload(header, buffer.payload(header.stored_bytes))
        return header if reason is None else Miss(reason, f"{path}: {reason}")

    def read_header(self, namespace: NamespaceId, key: Key) -> BlobHeader | Miss:
        """Read and verify a blob's header only; says nothing of its payload."""
        path = self._layout.blob(namespace, key)
        page = memoryview(bytearray(HEADER_BYTES))
        try:
            fd = self._os.open(path, os.O_RDONLY)
            try:
                length = 0
                while count := self._os.read_into(fd, page[length:], length):
                    length += count
            finally:
                self._os.close(fd)
        except OSError as error:
            return self._missed(error, path)
        if length < HEADER_BYTES:
            return Miss(MissReason.TORN, f"{path} has {length} bytes, a header has {HEADER_BYTES}")
        try:
            header = decode_header(page)
        except CorruptError as error:
            return Miss(MissReason(error.reason), f"{path}: {error}")
        reason = check_header(header, namespace=namespace, key=key, raw_bytes=None, file_bytes=None)
        return header if reason is None else Miss(reason, f"{path}: {reason}")

    def probe(self, namespace: NamespaceId, key: Key) -> int | None:
        """Return the length of a blob's file by one stat; None if it is absent or surely torn.

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
        whole = found.size_bytes > HEADER_BYTES and found.size_bytes % ALIGN_BYTES == 0
        return found.size_bytes if found.is_file and whole else None

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
        self, namespace: NamespaceId, *, after: tuple[str, str] = ("", "")
    ) -> Iterator[tuple[tuple[str, str], list[ScanEntry]]]:
        """Yield the blobs of a namespace directory by directory, in a fixed order.

        Args:
            namespace: Which.
            after: The last directory that an earlier scan has done; those up to it are skipped.

        Yields:
            A directory's name, fit for ``after``, and its blobs. What vanishes while it is looked at
            is left out, and so is every name that no blob of ours can have.

        Raises:
            UnavailableError: A directory cannot be read.
        """
        base = self._layout.namespace(namespace)
        for outer in self._fans(base):
            if outer < after[0]:
                continue
            for inner in self._fans(f"{base}/{outer}"):
                if (outer, inner) > after:
                    yield (outer, inner), self._scan_leaf(namespace, f"{base}/{outer}/{inner}")

    def _fans(self, path: str) -> list[str]:
        return sorted(name for name in self._list(path, directories=True) if is_fan(name))

    def _scan_leaf(self, namespace: NamespaceId, path: str) -> list[ScanEntry]:
        entries: list[ScanEntry] = []
        for name in self._list(path, directories=False):
            if (key := blob_key(name)) is None or self._layout.blob(namespace, key) != (
                f"{path}/{name}"
            ):
                continue
            try:
                found = self._os.stat(f"{path}/{name}")
            except OSError as error:
                if is_absence(error):
                    continue
                raise translate(error, doing="look at", path=f"{path}/{name}") from error
            entries.append(ScanEntry(namespace, key, found.size_bytes, found.modified_s))
        return entries

    def _list(self, path: str, *, directories: bool) -> list[str]:
        try:
            found = self._os.scan(path)
        except OSError as error:
            if is_missing(error):
                return []
            raise translate(error, doing="list", path=path) from error
        return [
            entry.name for entry in found if (entry.is_directory if directories else entry.is_file)
        ]

    # Inside.

    def _missed(self, error: OSError, path: str) -> Miss:
        if is_absence(error):
            return Miss(MissReason.ABSENT)
        return Miss(MissReason.IO, str(translate(error, doing="read", path=path)))

    def _scratch(self, payload_bytes: int) -> Buffer:
        """Return this thread's own buffer, grown to what is needed."""
        assert payload_bytes <= RAW_BYTES_MAX, f"{payload_bytes} bytes are no chunk"
        scratch: Buffer | None = getattr(self._per_thread, "scratch", None)
        if scratch is None or scratch.capacity_bytes < payload_bytes:
            scratch = Buffer.allocate(payload_bytes)
            self._per_thread.scratch = scratch
        return scratch

    def _choose_direct_io(self) -> bool:
        """Try whether this root takes O_DIRECT at our alignment, as configured."""
        if self._config.direct_io == "off" or self._config.read_only:
            return False
        directory = self._layout.temporary(self.writer)
        path = f"{directory}/probe"
        page = memoryview(mmap.mmap(-1, ALIGN_BYTES))
        try:
            self.root.ensure_directory(directory)
            fd = self._os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, FILE_MODE)
            try:
                works = (
                    self._os.write_from(fd, page, ALIGN_BYTES) == ALIGN_BYTES
                    and self._os.read_into(fd, page, ALIGN_BYTES) == ALIGN_BYTES
                )
            finally:
                self._os.close(fd)
        except OSError:
            works = False
        finally:
            # Who only reads leaves no trace.
            with contextlib.suppress(OSError):
                self._os.unlink(path)
                self._os.remove_directory(directory)
        if self._config.direct_io == "on" and not works:
            raise InvalidError(
                f"direct_io is 'on', but {self.root.path} refuses O_DIRECT: use 'auto' or 'off'"
            )
        return works
