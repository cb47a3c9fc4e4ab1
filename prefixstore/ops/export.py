"""Chunks of a root into an archive: what was chosen and all that comes before it, parents first.

Every blob is verified as for a load before it is written: an archive does not spread damage. A chunk that is
damaged or has gone meanwhile is left out, with all that follows it: it could not be reached.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import BinaryIO

from prefixstore.config import RAW_BYTES_MAX
from prefixstore.errors import InvalidError
from prefixstore.index.base import Row
from prefixstore.keys import Fields, Key, NamespaceId
from prefixstore.ops.archive import ArchiveWriter
from prefixstore.store import Miss, PrefixStore
from prefixstore.tree.buffer import Buffer

__all__ = ["ExportReport", "Selection", "export", "select"]

ERRORS_MAX = 20
"""Sentences that people read; the count of chunks tells the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be exported.

    Attributes:
        chunks: Address and parent of each, parents before children.
        namespaces: Fields of their namespaces.
        file_bytes: What their files take.
        unknown_keys: Keys that were asked for and are in no namespace that was looked at.
    """

    chunks: tuple[tuple[NamespaceId, Key, Key | None], ...]
    namespaces: dict[NamespaceId, Fields]
    file_bytes: int
    unknown_keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported.

    Attributes:
        chunks: Blobs in the archive.
        file_bytes: Their bytes.
        namespaces: How many namespaces they are of.
        unknown_keys: Keys that were asked for and were not there, in hex.
        errors: Sentences on what was left out.
    """

    chunks: int
    file_bytes: int
    namespaces: int
    unknown_keys: tuple[str, ...]
    errors: tuple[str, ...]


def select(
    store: PrefixStore,
    *,
    namespace: NamespaceId | None = None,
    pins: Sequence[str] = (),
    keys: Iterable[Key] | None = None,
) -> Selection:
    """Choose chunks; what comes before them in their prompts is chosen with them.

    Args:
        store: The root, with its index reconciled.
        namespace: Only from here; None for everywhere.
        pins: What these pins hold.
        keys: These chunks. With neither pins nor keys everything is chosen.

    Raises:
        InvalidError: A pin is not there, a namespace's manifest cannot be read, or the index does not hold
            all of the root.
        UnavailableError: The index was cleared or failed meanwhile.
    """
    store.check_whole()
    wanted = _wanted(store, pins, keys)
    chunks: list[tuple[int, NamespaceId, Key, Key | None]] = []
    namespaces: dict[NamespaceId, Fields] = {}
    unknown = set(wanted) if wanted is not None else set()
    size_bytes = 0
    for each in [namespace] if namespace is not None else list(store.root.namespaces()):
        rows = {row.key: row for row in store.hints.scan(each)}
        chosen = set(rows) if wanted is None else _with_ancestors(rows, wanted)
        unknown -= chosen
        for key in chosen:
            record = rows[key].record
            chunks.append((record.end_token, each, key, record.parent))
            size_bytes += record.file_bytes
        if chosen:
            manifest = store.root.manifest(each)
            if manifest is None:
                raise InvalidError(
                    f"{store.root.layout.manifest(each)} is not there: without its fields a namespace "
                    "cannot be used elsewhere"
                )
            namespaces[each] = manifest.fields
    store.check_whole()
    chunks.sort(key=itemgetter(0))
    return Selection(
        chunks=tuple((each, key, parent) for _, each, key, parent in chunks),
        namespaces=namespaces,
        file_bytes=size_bytes,
        unknown_keys=tuple(sorted(unknown)),
    )


def export(
    store: PrefixStore,
    selection: Selection,
    out: BinaryIO,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> ExportReport:
    """Write an archive.

    Args:
        store: The root.
        selection: What to write.
        out: Where; written in order, never sought in.
        progress: Told of the bytes of each chunk that is done with.

    Raises:
        OSError: ``out`` refuses.
    """
    buffer = Buffer.allocate(RAW_BYTES_MAX)
    writer = ArchiveWriter(out)
    writer.begin(
        store_id=store.root.store_id,
        namespaces=selection.namespaces,
        chunks=len(selection.chunks),
        size_bytes=selection.file_bytes,
    )
    written: set[tuple[NamespaceId, Key]] = set()
    left_out: set[tuple[NamespaceId, Key]] = set()
    errors: list[str] = []
    size_bytes = unreachable = 0
    for namespace, key, parent in selection.chunks:
        # A parent that is not in the root at all is no loss: windows and states are kept without theirs.
        if parent is not None and (namespace, parent) in left_out:
            left_out.add((namespace, key))
            unreachable += 1
            continue
        found = store.tree.read_image(namespace, key, buffer)
        if isinstance(found, Miss):
            errors.append(f"{key.hex()} was left out: {found.detail or found.reason}")
            left_out.add((namespace, key))
            continue
        _, image = found
        writer.add(image)
        written.add((namespace, key))
        size_bytes += len(image)
        progress(len(image))
    writer.end()
    if unreachable:
        errors.append(f"{unreachable} chunks were left out: they follow what was")
    return ExportReport(
        chunks=len(written),
        file_bytes=size_bytes,
        namespaces=len({namespace for namespace, _ in written}),
        unknown_keys=tuple(key.hex() for key in selection.unknown_keys),
        errors=tuple(errors[:ERRORS_MAX]),
    )


def _wanted(store: PrefixStore, pins: Sequence[str], keys: Iterable[Key] | None) -> set[Key] | None:
    """Return the keys that were named; None when nothing was."""
    if not pins and keys is None:
        return None
    held = {pin.name: pin.keys for pin in store.pins()}
    missing = [name for name in pins if name not in held]
    if missing:
        raise InvalidError(
            f"no pin {missing[0]!r} in {store.root.path}; there are: {', '.join(sorted(held)) or 'none'}"
        )
    return {*(keys or ()), *(key for name in pins for key in held[name])}


def _with_ancestors(rows: dict[Key, Row], wanted: set[Key]) -> set[Key]:
    chosen: set[Key] = set()
    for key in wanted:
        at: Key | None = key
        while at is not None and at in rows and at not in chosen:
            chosen.add(at)
            at = rows[at].record.parent
    return chosen
