"""What lies in a root, directory by directory, in bounded memory.

A scan reads names and sizes, never content. It meets whatever strays into a root: names outside the
grammar of ``prefixstore.tree.paths``, links, devices and files in a directory that is not theirs are
passed over. On a shared filesystem a listing is not of one moment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefixstore.errors import PrefixStoreError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.osfs import Os
from prefixstore.tree.paths import Layout, blob_key, is_fan, temporary_writer
from prefixstore.tree.trouble import is_absence, is_missing, translate

__all__ = ["ScanEntry", "names_in", "scan_blobs", "scan_temporaries"]


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A blob as its directory shows it, unverified."""

    namespace: NamespaceId
    key: Key
    file_bytes: int
    modified_s: float


def scan_blobs(
    calls: Os,
    layout: Layout,
    namespace: NamespaceId,
    *,
    after: tuple[str, str],
    pass_over: Callable[[tuple[str, str], PrefixStoreError], None] | None = None,
) -> Iterator[tuple[tuple[str, str], list[ScanEntry]]]:
    """Yield the blobs of a namespace by directory; see ``BlobTree.scan``."""
    base = layout.namespace(namespace)
    for outer in _fans(calls, base):
        if outer < after[0]:
            continue
        for inner in _fans(calls, f"{base}/{outer}"):
            if (outer, inner) <= after:
                continue
            try:
                entries = _scan_leaf(calls, layout, namespace, f"{base}/{outer}/{inner}")
            except PrefixStoreError as error:
                if pass_over is None:
                    raise
                pass_over((outer, inner), error)
            else:
                yield (outer, inner), entries


def scan_temporaries(
    calls: Os,
    layout: Layout,
    namespace: NamespaceId,
    *,
    pass_over: Callable[[PrefixStoreError], None],
) -> Iterator[tuple[str, str]]:
    """Yield writer and path of each unpublished file of a namespace.

    Args:
        calls: The seam.
        layout: The root's paths.
        namespace: Which.
        pass_over: Told of each directory that cannot be read; may raise to end the scan.
    """

    def names(path: str, *, directories: bool) -> list[str]:
        try:
            return names_in(calls, path, directories=directories)
        except PrefixStoreError as error:
            pass_over(error)
            return []

    base = layout.namespace(namespace)
    for outer in filter(is_fan, names(base, directories=True)):
        for inner in filter(is_fan, names(f"{base}/{outer}", directories=True)):
            leaf = f"{base}/{outer}/{inner}"
            for name in names(leaf, directories=False):
                if (writer := temporary_writer(name)) is not None:
                    yield writer, f"{leaf}/{name}"


def names_in(calls: Os, path: str, *, directories: bool) -> list[str]:
    """Return the names of a directory's directories, or of its files; none if it is missing.

    Raises:
        UnavailableError: It cannot be read.
    """
    try:
        entries = calls.scan(path)
    except OSError as error:
        if is_missing(error):
            return []
        raise translate(error, doing="list", path=path) from error
    return [e.name for e in entries if (e.is_directory if directories else e.is_file)]


def _fans(calls: Os, path: str) -> list[str]:
    return sorted(filter(is_fan, names_in(calls, path, directories=True)))


def _scan_leaf(calls: Os, layout: Layout, namespace: NamespaceId, leaf: str) -> list[ScanEntry]:
    entries: list[ScanEntry] = []
    for name in names_in(calls, leaf, directories=False):
        path = f"{leaf}/{name}"
        key = blob_key(name)
        if key is None or layout.blob(namespace, key) != path:
            continue
        try:
            found = calls.stat(path)
        except OSError as error:
            if is_absence(error):
                continue
            raise translate(error, doing="look at", path=path) from error
        entries.append(ScanEntry(namespace, key, found.size_bytes, found.modified_s))
    return entries
