"""An archive into a root: proved first, then published chunk by chunk, each as durable as any store.

    1 read it all      the archive is whole, every blob sound, of a namespace whose fields make its id,
                       and follows its parent: nothing has become visible yet
    2 read it again    and publish what is not there; each blob is checked once more

A stream that can be read only once (a pipe) is proved blob by blob, before each is published. What was published
stays, so that an import that was killed, or found no room, goes on where it ended when it is run again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

from prefixstore.blob.header import BlobHeader
from prefixstore.blob.verify import check_image
from prefixstore.config import RAW_BYTES_MAX
from prefixstore.errors import CorruptError, FullError, InvalidError, UnavailableError
from prefixstore.keys import Fields, Key, NamespaceId, namespace_id
from prefixstore.ops.archive import ArchiveDocument, ArchiveReader
from prefixstore.store import PrefixStore, SkipReason, StoreOutcome
from prefixstore.tree.buffer import Buffer

__all__ = ["ImportReport", "import_archive", "import_stream", "inspect"]

Progress = Callable[[int], None]
OpenStore = Callable[[Fields], PrefixStore]
NO_ROOM = frozenset({SkipReason.QUOTA, SkipReason.LOW_SPACE, SkipReason.FULL})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did.

    Attributes:
        chunks: Chunks in the archive.
        imported: Chunks that were published now.
        existed: Chunks that were there before.
        file_bytes: What the published ones take.
        namespaces: Ids of their namespaces.
    """

    chunks: int
    imported: int
    existed: int
    file_bytes: int
    namespaces: tuple[NamespaceId, ...]


@dataclass(slots=True)
class _Sum:
    chunks: int = 0
    imported: int = 0
    existed: int = 0
    file_bytes: int = 0
    keys: dict[NamespaceId, set[Key]] = field(default_factory=dict)


def inspect(source: BinaryIO, *, name: str, progress: Progress = lambda _: None) -> ArchiveDocument:
    """Prove a whole archive and return what it says of itself.

    Raises:
        InvalidError: It is no whole archive, or names a namespace that its fields do not make.
        CorruptError: A blob in it is damaged, or follows one that does not come before it.
    """
    reader = ArchiveReader(source, name=name)
    for _ in _sound(reader, Buffer.allocate(RAW_BYTES_MAX).image, name=name, progress=progress):
        pass
    return reader.document


def import_archive(
    opened: Callable[[], AbstractContextManager[BinaryIO]],
    open_store: OpenStore,
    *,
    name: str,
    pin: str | None = None,
    progress: Progress = lambda _: None,
) -> ImportReport:
    """Prove an archive that can be opened twice, then import it.

    Args:
        opened: Opens the archive from its start.
        open_store: Opens the root for a namespace's fields; what it returns is closed here.
        name: What errors call the archive.
        pin: Keep all of its chunks under this name; None for no pin.
        progress: Told of the bytes of each blob that is done with, in both passes.

    Raises:
        InvalidError, CorruptError: As ``inspect``; nothing was imported.
        FullError: There is no room for more; what was imported stays.
        UnavailableError: The root cannot be written now; what was imported stays.
    """
    with opened() as source:
        inspect(source, name=name, progress=progress)
    with opened() as source:
        return import_stream(source, open_store, name=name, pin=pin, progress=progress)


def import_stream(
    source: BinaryIO,
    open_store: OpenStore,
    *,
    name: str,
    pin: str | None = None,
    progress: Progress = lambda _: None,
) -> ImportReport:
    """Import an archive that is read once; arguments and errors as ``import_archive``.

    A damaged stream ends the import at the damage: what came before it was proved, and stays.
    """
    reader = ArchiveReader(source, name=name)
    fields = _proved(reader.document, name=name)
    image = Buffer.allocate(RAW_BYTES_MAX).image
    done = _Sum()
    with ExitStack() as opened:
        stores = {
            namespace: opened.enter_context(open_store(its_fields))
            for namespace, its_fields in fields.items()
        }
        for header, blob in _sound(reader, image, name=name, progress=progress):
            outcome = stores[header.namespace].adopt(blob)
            _count(done, header, outcome, file_bytes=len(blob), name=name)
        if pin is not None:
            for at, (namespace, keys) in enumerate(sorted(done.keys.items())):
                # A pin is of one namespace.
                stores[namespace].pin(pin if not at else f"{pin}.{at}", sorted(keys))
    return ImportReport(
        chunks=done.chunks,
        imported=done.imported,
        existed=done.existed,
        file_bytes=done.file_bytes,
        namespaces=tuple(sorted(done.keys)),
    )


def _sound(
    reader: ArchiveReader, image: memoryview, *, name: str, progress: Progress
) -> Iterator[tuple[BlobHeader, memoryview]]:
    """Yield each blob once it is proved to be sound, of a known namespace, and after its parent."""
    namespaces = _proved(reader.document, name=name)
    seen: dict[NamespaceId, set[Key]] = {each: set() for each in namespaces}
    missing: dict[NamespaceId, set[Key]] = {each: set() for each in namespaces}
    for number, blob in enumerate(reader.blobs(image)):
        try:
            header = check_image(blob)
        except CorruptError as error:
            raise CorruptError(error.reason, f"{name}, blob {number}: {error}") from error
        if header.namespace not in seen:
            raise CorruptError(
                "namespace",
                f"{name}, blob {number}: of namespace {header.namespace}, whose fields it does not tell",
            )
        known, followed = seen[header.namespace], missing[header.namespace]
        if header.key in known or header.key in followed:
            raise CorruptError(
                "key",
                f"{name}, blob {number}: {header.key.hex()} comes twice or after what follows it",
            )
        known.add(header.key)
        # Windows and states are kept without what comes before them, so a parent may be missing; but it
        # must not come later.
        if header.parent is not None and header.parent not in known:
            followed.add(header.parent)
        yield header, blob
        progress(len(blob))


def _proved(document: ArchiveDocument, *, name: str) -> dict[NamespaceId, Fields]:
    """Return the namespaces, each of which its fields make."""
    proved: dict[NamespaceId, Fields] = {}
    for claimed, fields in document.namespaces.items():
        made = namespace_id(fields)
        if made != claimed:
            raise InvalidError(
                f"{name}: it says namespace {claimed[:64]!r}, its fields make {made}: not an archive of "
                "ours, or changed since"
            )
        proved[made] = fields
    return proved


def _count(
    done: _Sum, header: BlobHeader, outcome: StoreOutcome, *, file_bytes: int, name: str
) -> None:
    if not outcome.published:
        message = (
            f"{name}: {done.imported} of {done.chunks} chunks so far were imported, the next was not "
            f"({outcome.reason}): {outcome.detail or 'the limits of the root'}; make room or raise the "
            "limit, and run it again: it goes on from here"
        )
        raise FullError(message) if outcome.reason in NO_ROOM else UnavailableError(message)
    done.chunks += 1
    done.imported += not outcome.existed
    done.existed += outcome.existed
    done.file_bytes += 0 if outcome.existed else file_bytes
    done.keys.setdefault(header.namespace, set()).add(header.key)
