"""The archive: chunks of a root in one stream, which any tar lists and nothing but us trusts.

    prefixstore.json        what is inside: format, namespaces with all their fields, what was planned
    blobs/000000000000.kv   the first blob, byte for byte as it lies in the root; parents before children
    blobs/000000000001.kv   ...
    end.json                how many there were, and XXH3-128 over all of their bytes

Blobs are numbered: their names are in their headers, and a name that says nothing cannot lie. Reading is
strict: plain files only, under exactly the next name, no larger than a blob can be. Nothing else of tar is
understood, so there is no link to follow, no path to leave by and no header that asks for memory. Pure: a
stream in or out.
"""

import tarfile
from collections.abc import Iterator, Mapping
from typing import Annotated, BinaryIO, Final, TypeVar

import msgspec
import xxhash
from msgspec import Meta

from prefixstore.blob.header import ALIGN_BYTES, FILE_BYTES_MAX, HEADER_BYTES
from prefixstore.config import DOCUMENT_BYTES_MAX
from prefixstore.errors import InvalidError
from prefixstore.keys import NamespaceId

__all__ = ["FORMAT", "ArchiveDocument", "ArchiveReader", "ArchiveWriter"]

FORMAT: Final = 1
BLOCK_BYTES: Final = 512
HEAD, END = "prefixstore.json", "end.json"
PIECE_BYTES = 2**20
NUMBERS_MAX = 10**12
"""Twelve digits of blobs: a name that ustar holds, and more than a root does."""

D = TypeVar("D", bound=msgspec.Struct)
Count = Annotated[int, Meta(ge=0)]


class ArchiveDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The first member.

    Attributes:
        archive: The format, ``FORMAT``.
        store_id: Where the chunks come from.
        namespaces: The fields of each namespace, by its id.
        chunks: Blobs that were to be written; what goes meanwhile is left out.
        file_bytes: Their bytes.
    """

    archive: int
    store_id: str
    namespaces: dict[str, dict[str, object]]
    chunks: Count
    file_bytes: Count


class EndDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The last member: without it an archive is cut off."""

    chunks: Count
    xxh3_128: str


class ArchiveWriter:
    """Writes one archive to a stream that need not be seekable. Not thread-safe."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._chunks = 0
        self._digest = xxhash.xxh3_128()

    def begin(
        self,
        *,
        store_id: str,
        namespaces: Mapping[NamespaceId, Mapping[str, object]],
        chunks: int,
        size_bytes: int,
    ) -> None:
        """Write the first member."""
        document = ArchiveDocument(
            archive=FORMAT,
            store_id=store_id,
            namespaces={name: dict(fields) for name, fields in namespaces.items()},
            chunks=chunks,
            file_bytes=size_bytes,
        )
        self._member(HEAD, memoryview(msgspec.json.format(msgspec.json.encode(document))))

    def add(self, image: memoryview) -> None:
        """Write a blob's file image."""
        self._member(_name(self._chunks), image)
        self._digest.update(image)
        self._chunks += 1

    def end(self) -> None:
        """Write the last member and tar's own end."""
        document = EndDocument(chunks=self._chunks, xxh3_128=self._digest.hexdigest())
        self._member(END, memoryview(msgspec.json.encode(document)))
        self._out.write(bytes(2 * BLOCK_BYTES))

    def _member(self, name: str, content: memoryview) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._out.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._out.write(content)
        self._out.write(bytes(-len(content) % BLOCK_BYTES))


class ArchiveReader:
    """Reads one archive from a stream, once. Not thread-safe.

    Every method raises ``InvalidError``, naming the archive, for a stream that is no whole archive.

    Attributes:
        document: What the archive says of itself; nothing of it is proved.
    """

    def __init__(self, source: BinaryIO, *, name: str) -> None:
        """Read the first member.

        Args:
            source: The stream; read to its end and left open.
            name: What errors call it.
        """
        self._source = source
        self._name = name
        self._offset = 0
        _, size = self._header(HEAD, limit_bytes=DOCUMENT_BYTES_MAX)
        self.document = self._document(size, ArchiveDocument)
        if self.document.archive != FORMAT:
            raise self._refusal(
                f"format {self.document.archive}, this version reads {FORMAT}: use a newer prefixstore"
            )

    @property
    def read_bytes(self) -> int:
        """How much of the stream has been read."""
        return self._offset

    def blobs(self, image: memoryview) -> Iterator[memoryview]:
        """Yield the image of each blob, in ``image``'s own memory, until the next is asked for.

        Ends only if the last member was there and agrees with all that was read.

        Args:
            image: Room for the largest blob that is accepted.
        """
        digest = xxhash.xxh3_128()
        number = 0
        while True:
            limit_bytes = max(DOCUMENT_BYTES_MAX, min(FILE_BYTES_MAX, len(image)))
            name, size = self._header(_name(number), END, limit_bytes=limit_bytes)
            if name == END:
                break
            if size > len(image):
                raise self._refusal(f"{name} says it has {size} bytes, no blob has so many")
            if size <= HEADER_BYTES or size % ALIGN_BYTES:
                raise self._refusal(f"{name} has {size} bytes, which no blob has")
            self._fill(image[:size])
            self._skip_padding(size)
            digest.update(image[:size])
            number += 1
            yield image[:size]
        end = self._document(size, EndDocument)
        found = EndDocument(chunks=number, xxh3_128=digest.hexdigest())
        if end != found:
            raise self._refusal(f"its end says {end}, read were {found}: it was damaged on its way")
        if self._source.read(2 * BLOCK_BYTES).strip(b"\0"):
            raise self._refusal("something follows its end")

    def _header(self, *names: str, limit_bytes: int) -> tuple[str, int]:
        """Read the header of the member that must come next, one of ``names``; return its length, too."""
        name = " or ".join(names)
        block = bytearray(BLOCK_BYTES)
        self._fill(memoryview(block))
        try:
            info = tarfile.TarInfo.frombuf(bytes(block), "ascii", "strict")
        except (tarfile.TarError, UnicodeDecodeError, ValueError) as error:
            raise self._refusal(f"{name} expected, no member found ({error})") from error
        if info.type != tarfile.REGTYPE or info.name not in names:
            raise self._refusal(f"{name} expected, {info.name[:200]!r} (type {info.type!r}) found")
        if not 0 < info.size <= limit_bytes:
            raise self._refusal(
                f"{info.name} says it has {info.size} bytes, 1 to {limit_bytes} may be"
            )
        return info.name, info.size

    def _document(self, size: int, kind: type[D]) -> D:
        content = bytearray(size)
        self._fill(memoryview(content))
        self._skip_padding(size)
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise self._refusal(f"no valid {kind.__name__} ({error})") from error

    def _skip_padding(self, size: int) -> None:
        padding = bytearray(-size % BLOCK_BYTES)
        self._fill(memoryview(padding))

    def _fill(self, room: memoryview) -> None:
        done = 0
        while done < len(room):
            piece = self._source.read(min(PIECE_BYTES, len(room) - done))
            if not piece:
                raise self._refusal("it ends early: copy it again; what was imported stays good")
            room[done : done + len(piece)] = piece
            done += len(piece)
        self._offset += done

    def _refusal(self, problem: str) -> InvalidError:
        return InvalidError(f"{self._name}, byte {self._offset}: not a whole archive: {problem}")


def _name(number: int) -> str:
    assert number < NUMBERS_MAX, "no root holds so many"
    return f"blobs/{number:012d}.kv"
