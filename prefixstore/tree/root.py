"""A root: the directory that is one store, with its identity and its namespaces.

``store.json`` says that a directory is a root of ours, and of which format. It is written once, read at
every open and never guessed: a directory without it is a root only if it is empty, and becomes one when
it is opened for writing.

Whoever may read ``store.json`` may read every other document: tools are run by other users than engines are,
with other umasks, and one that some engine cannot read is worse for it than one that is not there. A root that
was made for a group is so for everybody who opens it, whatever their settings say.

A namespace is a directory whose name is derived from the namespace's fields. The name is never believed:
the manifest in it holds the fields in full, and they are compared at every open.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import Fields, NamespaceId, namespace_id
from prefixstore.tree.documents import ensure_directory, put_document, read_document
from prefixstore.tree.osfs import FILE_MODE, GROUP_FILE_MODE, Os, RealOs
from prefixstore.tree.paths import Layout, is_namespace
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["FORMAT", "Manifest", "Root", "RootDocument", "diff_fields"]

FORMAT = 1
"""The layout of a root. A reader refuses any other: a root is never converted by opening it."""
FAN_OUT = (256, 256)
GROUP_DIRECTORY_MODE = 0o2770
GROUP_WRITES = 0o020
STRAY_NAMES_SHOWN = 5
_NOTHING = object()
"""Stands for a field that is not there; None is a value of JSON."""


class RootDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``store.json``.

    Unknown fields are accepted: a later minor version may add some. ``format`` guards the rest.
    """

    prefixstore_root: str
    """The store's id, 32 hex digits. The field's name is the file's magic."""
    format: int
    fan_out: tuple[int, int] = FAN_OUT


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``manifest.json`` of a namespace: its fields, in full."""

    fields: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """An opened root. Immutable; safe for concurrent use.

    Attributes:
        store_id: Who this store is, wherever it is mounted.
        layout: Its paths.
        os_calls: The seam through which it is reached.
        group_shared: Whether what is made is writable by the group.
        document_mode: The permissions of ``store.json``, for all other documents; None leaves them to the
            umask.
    """

    store_id: str
    layout: Layout
    os_calls: Os
    group_shared: bool = False
    document_mode: int | None = None

    @classmethod
    def create(cls, path: str, *, os_calls: Os | None = None, group_shared: bool = False) -> Self:
        """Make a directory a root, or open it if it is one.

        Raises:
            InvalidError: The directory holds something else, or a root of another format.
            UnavailableError: It cannot be made or reached.
        """
        calls = os_calls or RealOs()
        layout = Layout(_absolute(path))
        mode = GROUP_DIRECTORY_MODE if group_shared else None
        try:
            ensure_directory(layout.root, os_calls=calls, mode=mode)
            found = calls.scan(layout.root)
        except OSError as error:
            raise translate(error, doing="make the root", path=layout.root) from error
        names = sorted(entry.name for entry in found)
        if "store.json" not in names:
            # A crash, or another process, may have left temporary files of this very step.
            strays = [name for name in names if not name.startswith(("store.json.", "lost+found"))]
            if strays:
                shown = ", ".join(strays[:STRAY_NAMES_SHOWN])
                raise InvalidError(
                    f"{layout.root} is not a prefixstore root and not empty (found {shown}, expected "
                    "store.json): name an empty or a new directory"
                )
            document = RootDocument(prefixstore_root=uuid.uuid4().hex, format=FORMAT)
            file_mode = GROUP_FILE_MODE if group_shared else None
            put_document(layout.store, document, os_calls=calls, mode=file_mode)
        root = cls.open(path, os_calls=calls, group_shared=group_shared)
        root.make_directories()
        return root

    @classmethod
    def open(cls, path: str, *, os_calls: Os | None = None, group_shared: bool = False) -> Self:
        """Open a root; changes nothing.

        Args:
            path: Its absolute path.
            os_calls: The seam to the filesystem; the machine's if None.
            group_shared: Treat it as a group's, though it may not have been made for one.

        Raises:
            InvalidError: It is no root, or of another format.
            UnavailableError: It cannot be reached.
        """
        calls = os_calls or RealOs()
        layout = Layout(_absolute(path))
        document = read_document(layout.store, RootDocument, os_calls=calls)
        if document is None:
            _refuse_missing(layout, calls)
            raise InvalidError(
                f"{layout.root} is not a prefixstore root: it has no store.json. Make one with "
                f"`prefixstore init {layout.root}`"
            )
        if document.format != FORMAT or document.fan_out != FAN_OUT:
            raise InvalidError(
                f"{layout.store}: format {document.format} with fan-out {document.fan_out}, expected "
                f"{FORMAT} with {FAN_OUT}: use the version of prefixstore that made this root"
            )
        mode = _mode_of(calls, layout.store)
        group_shared = group_shared or _is_of_group(calls, layout, store_mode=mode)
        return cls(
            store_id=document.prefixstore_root,
            layout=layout,
            os_calls=calls,
            group_shared=group_shared,
            document_mode=GROUP_FILE_MODE if group_shared else mode,
        )

    @property
    def path(self) -> str:
        """Where the root is mounted here."""
        return self.layout.root

    def namespace(self, fields: Fields, *, create: bool) -> NamespaceId:
        """Return the id of the namespace with exactly these fields.

        Args:
            fields: JSON values; everything that decides a chunk's bytes besides its tokens.
            create: Make it if it is not there. Without, only its id is worked out.

        Raises:
            InvalidError: Its directory belongs to other fields.
            UnavailableError: The root cannot be reached.
        """
        wanted = _as_json(fields)
        identity = namespace_id(wanted)
        manifest = self.manifest(identity)
        if manifest is None:
            if not create:
                return identity
            try:
                self.ensure_directory(self.layout.namespace(identity))
            except OSError as error:
                path = self.layout.namespace(identity)
                raise translate(error, doing="make the namespace", path=path) from error
            path = self.layout.manifest(identity)
            put_document(
                path,
                Manifest(fields=wanted),
                os_calls=self.os_calls,
                mode=self.document_mode,
            )
            manifest = self.manifest(identity)
            if manifest is None:
                raise UnavailableError(f"{path} was written and is not there: look at the mount")
        if not _is_same(manifest.fields, wanted):
            lines = "; ".join(diff_fields(manifest.fields, wanted))
            raise InvalidError(
                f"{self.layout.manifest(identity)} belongs to another namespace ({lines}): it was "
                "changed by hand or damaged. Remove its directory; what it holds is computed again"
            )
        return identity

    def manifest(self, namespace: NamespaceId) -> Manifest | None:
        """Read a namespace's manifest; None if there is none."""
        return read_document(self.layout.manifest(namespace), Manifest, os_calls=self.os_calls)

    def namespaces(self) -> Iterator[NamespaceId]:
        """Yield the ids of the namespaces in the root, in order.

        Raises:
            UnavailableError: The root cannot be read now.
        """
        try:
            entries = self.os_calls.scan(self.layout.namespaces)
        except OSError as error:
            if is_missing(error):
                return
            raise translate(error, doing="list", path=self.layout.namespaces) from error
        for name in sorted(entry.name for entry in entries if entry.is_directory):
            if is_namespace(name):
                yield NamespaceId(name)

    def ensure_directory(self, path: str) -> None:
        """Make a directory and its parents with the root's permissions; raises ``OSError``."""
        mode = GROUP_DIRECTORY_MODE if self.group_shared else None
        ensure_directory(path, os_calls=self.os_calls, mode=mode)
        if mode is None:
            return
        # Its maker may have died before it gave it its mode.
        with contextlib.suppress(OSError):  # Another user's is theirs to mend.
            if not self.os_calls.stat(path).mode & GROUP_WRITES:
                self.os_calls.set_mode(path, mode)

    def check_writable(self) -> None:
        """Make and remove a file, as a writer does.

        Raises:
            FullError, UnavailableError: It cannot; the error says why.
        """
        path = self.layout.probe(uuid.uuid4().hex)
        try:
            fd = self.os_calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
            try:
                self.os_calls.close(fd)
            finally:
                self.os_calls.unlink(path)
        except OSError as error:
            raise translate(error, doing="write", path=path) from error

    def make_directories(self) -> None:
        """Make the directories that every root has.

        Raises:
            UnavailableError: One cannot be made.
        """
        layout = self.layout
        for path in (
            layout.namespaces,
            layout.writers,
            layout.pins,
            layout.quarantine,
            layout.collector,
        ):
            try:
                self.ensure_directory(path)
            except OSError as error:
                raise translate(error, doing="make", path=path) from error


def diff_fields(found: object, wanted: object, *, name: str = "", limit: int = 20) -> list[str]:
    """Say field by field how two namespaces differ; at most ``limit`` lines.

    >>> diff_fields({"dtype": "float16"}, {"dtype": "bfloat16"})
    ["dtype: 'float16' found, 'bfloat16' expected"]
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines: list[str] = []
        for key in sorted({*found, *wanted}):
            inner = f"{name}.{key}" if name else str(key)
            lines += diff_fields(
                found.get(key, _NOTHING), wanted.get(key, _NOTHING), name=inner, limit=limit
            )
            if len(lines) >= limit:
                break
        return lines[:limit]
    if found == wanted and type(found) is type(wanted):
        return []
    return [f"{name or 'fields'}: {_shown(found)} found, {_shown(wanted)} expected"]


def _shown(value: object) -> str:
    return "nothing" if value is _NOTHING else f"{value!r:.200}"


def _as_json(fields: Fields) -> dict[str, object]:
    """Bring fields into the very form that they have after a round trip through the manifest."""
    plain = msgspec.json.decode(msgspec.json.encode(dict(fields)))
    assert isinstance(plain, dict), "a dict stays a dict"
    return plain


def _is_same(found: dict[str, object], wanted: dict[str, object]) -> bool:
    """Whether two sets of fields are the same JSON; in Python, 1 == 1.0 == True."""
    one, other = (msgspec.json.encode(fields, order="sorted") for fields in (found, wanted))
    return one == other


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidError(
            f"a root is named by its absolute path, {path!r} is not: engines and tools run in "
            "different directories"
        )
    return path.rstrip("/") or "/"


def _mode_of(calls: Os, path: str) -> int | None:
    """Return a file's permissions; None if the filesystem does not say."""
    try:
        return calls.stat(path).mode
    except OSError:
        return None


def _is_of_group(calls: Os, layout: Layout, *, store_mode: int | None) -> bool:
    """Whether a root was made for the users of one group.

    A umask can give ``store.json`` the same mode, and so can a mount that shows one mode for all files; only
    a root of a group has setgid directories besides.
    """
    if store_mode != GROUP_FILE_MODE:
        return False
    return _mode_of(calls, layout.namespaces) == GROUP_DIRECTORY_MODE


def _refuse_missing(layout: Layout, calls: Os) -> None:
    """Raise if the root's directory is not there at all: a missing mount heals, a wrong path not."""
    try:
        calls.stat(layout.root)
    except OSError as error:
        raise translate(error, doing="open the root", path=layout.root) from error
