"""What a root holds, as plain values for people and scripts."""

from dataclasses import dataclass

from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.index.base import Row
from prefixstore.keys import NamespaceId, kv_group
from prefixstore.ops.hosts import CollectorLine, WriterLine, collector_line, writer_lines
from prefixstore.store import PrefixStore
from prefixstore.tree.limits import LimitsDocument, read_limits
from prefixstore.tree.quarantine import Quarantine

__all__ = ["ChunkLine", "NamespaceLine", "RootReport", "chunk_line", "namespace_lines", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceLine:
    """One namespace.

    Attributes:
        namespace: Its id.
        fields: Its manifest's fields; empty if the manifest cannot be read.
        chunks: Chunks in it.
        file_bytes: What their files take.
        raw_bytes: Their payloads, decoded.
        used_s: When one of them was last used, in seconds since the epoch; 0 if it is empty.
        oldest_s: When the one that was longest unused was last used; 0 if it is empty.
    """

    namespace: NamespaceId
    fields: dict[str, object]
    chunks: int
    file_bytes: int
    raw_bytes: int
    used_s: int
    oldest_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLine:
    """One chunk.

    Attributes:
        namespace: Where it belongs.
        key: Its key in hex digits.
        parent: Its parent's; None for a first chunk.
        group: Its KV cache group.
        end_token: Tokens from the start of the prompt to its end.
        file_bytes: What its file takes.
        raw_bytes: Its payload, decoded.
        used_s: When it was last used, in seconds since the epoch.
        children: Chunks that follow it.
        pins: Pins that hold it.
    """

    namespace: NamespaceId
    key: str
    parent: str | None
    group: int
    end_token: int
    file_bytes: int
    raw_bytes: int
    used_s: int
    children: int
    pins: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RootReport:
    """A root.

    Attributes:
        root: Its path.
        store_id: Its id, wherever it is mounted.
        chunks: Chunks in it.
        file_bytes: What their files take.
        raw_bytes: Their payloads, decoded.
        namespaces: Its namespaces.
        pins: Pins, by name, with the number of their keys.
        writers: Writers that have announced themselves and not left.
        limits: What all hosts keep to; None if there are none, or they cannot be understood.
        collector: Who collects.
        seen: The writers, one by one, the latest seen first.
        quarantine_files: Damaged blobs kept for inspection.
        quarantine_bytes: What they take.
        torn_files: Files under a blob's name that are no blobs, as a power cut leaves them.
        free_bytes: Room on the filesystem.
        total_bytes: Its size.
        errors: Sentences on what could not be read: figures are then too low.
    """

    root: str
    store_id: str
    chunks: int
    file_bytes: int
    raw_bytes: int
    namespaces: tuple[NamespaceLine, ...]
    pins: dict[str, int]
    writers: int
    limits: LimitsDocument | None
    collector: CollectorLine
    seen: tuple[WriterLine, ...]
    quarantine_files: int
    quarantine_bytes: int
    torn_files: int
    free_bytes: int
    total_bytes: int
    errors: tuple[str, ...]


def report(store: PrefixStore) -> RootReport:
    """Scan a root and add up what is in it.

    Raises:
        PrefixStoreError: The root's own files cannot be read.
    """
    scan = store.reconcile()
    errors = list(scan.errors)
    lines = namespace_lines(store)
    quarantine = Quarantine(store.root, bytes_max=0).contents()
    try:
        pins = {pin.name: len(pin.keys) for pin in store.pins()}
    except InvalidError as error:
        pins = {}
        errors.append(str(error))
    try:
        limits = read_limits(store.root)
    except InvalidError as error:
        limits = None
        errors.append(str(error))
    seen = writer_lines(store.root)
    space = store.root.os_calls.space(store.root.path)
    return RootReport(
        root=store.root.path,
        store_id=store.root.store_id,
        chunks=sum(line.chunks for line in lines),
        file_bytes=sum(line.file_bytes for line in lines),
        raw_bytes=sum(line.raw_bytes for line in lines),
        namespaces=tuple(lines),
        pins=pins,
        writers=len(seen),
        limits=limits,
        collector=collector_line(store.root, seen),
        seen=tuple(seen),
        quarantine_files=len(quarantine),
        quarantine_bytes=sum(stat.size_bytes for _, stat in quarantine),
        torn_files=len(scan.torn),
        free_bytes=space.free_bytes,
        total_bytes=space.total_bytes,
        errors=tuple(errors),
    )


def namespace_lines(store: PrefixStore) -> list[NamespaceLine]:
    """Return the namespaces of a root whose index is reconciled, the largest first.

    Raises:
        UnavailableError: The namespaces cannot be listed.
    """
    lines = []
    for namespace in store.root.namespaces():
        chunks = file_bytes = raw_bytes = used_s = oldest_s = 0
        for row in store.hints.scan(namespace):
            chunks += 1
            file_bytes += row.record.file_bytes
            raw_bytes += row.record.raw_bytes
            used_s = max(used_s, row.record.used_s)
            oldest_s = min(oldest_s or row.record.used_s, row.record.used_s)
        lines.append(
            NamespaceLine(
                namespace=namespace,
                fields=_fields(store, namespace),
                chunks=chunks,
                file_bytes=file_bytes,
                raw_bytes=raw_bytes,
                used_s=used_s,
                oldest_s=oldest_s,
            )
        )
    return sorted(lines, key=lambda line: -line.file_bytes)


def chunk_line(row: Row) -> ChunkLine:
    """Return one chunk's line."""
    return ChunkLine(
        namespace=row.namespace,
        key=row.key.hex(),
        parent=row.record.parent.hex() if row.record.parent else None,
        group=kv_group(row.key),
        end_token=row.record.end_token,
        file_bytes=row.record.file_bytes,
        raw_bytes=row.record.raw_bytes,
        used_s=row.record.used_s,
        children=row.refs.children,
        pins=row.refs.pins,
    )


def _fields(store: PrefixStore, namespace: NamespaceId) -> dict[str, object]:
    try:
        manifest = store.root.manifest(namespace)
    except PrefixStoreError:
        return {}
    return manifest.fields if manifest is not None else {}
