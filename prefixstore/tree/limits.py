"""The limits of a root: one document under it, so that all its hosts obey the same.

    limits.json    max_bytes, min_free_bytes, max_age_s, and max_bytes of single namespaces

A field that this version does not know, or a format that it does not, is refused and not passed over: a
limit that is not understood is not kept.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from prefixstore.errors import InvalidError
from prefixstore.keys import NamespaceId
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.paths import is_namespace
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["FORMAT", "LimitsDocument", "read_limits", "remove_limits", "write_limits"]

FORMAT = 1


class LimitsDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``limits.json``.

    Attributes:
        format: Always ``FORMAT``.
        max_bytes: What all blobs may take; None for no such limit.
        min_free_bytes: What the filesystem must have free for stores to go on.
        max_age_s: Chunks that nobody used for so long go; None for no such limit.
        namespaces: What the blobs of single namespaces may take, by the namespace's id.
    """

    format: int = FORMAT
    max_bytes: Annotated[int, Meta(ge=1)] | None = None
    min_free_bytes: Annotated[int, Meta(ge=0)] = 0
    max_age_s: Annotated[float, Meta(gt=0)] | None = None
    namespaces: dict[str, Annotated[int, Meta(ge=1)]] = msgspec.field(default_factory=dict)

    def of_namespaces(self) -> dict[NamespaceId, int]:
        """Return the limits of single namespaces under their ids' type."""
        return {NamespaceId(name): limit for name, limit in self.namespaces.items()}


def read_limits(root: Root) -> LimitsDocument | None:
    """Read the limits of a root; None if it has none.

    Raises:
        InvalidError: The document is damaged, or of a later version.
        UnavailableError: It cannot be read now.
    """
    path = root.layout.limits
    document = read_document(path, LimitsDocument, os_calls=root.os_calls)
    if document is None:
        return None
    strange = [name for name in document.namespaces if not is_namespace(name)]
    if document.format != FORMAT or strange:
        found = f"format {document.format}" if not strange else f"{strange[0]!r:.80}"
        raise InvalidError(
            f"{path}: found {found}, expected format {FORMAT} and ids of namespaces: use the version "
            "of prefixstore that wrote it, or set the limits anew with `prefixstore limits`"
        )
    return document


def write_limits(root: Root, document: LimitsDocument) -> None:
    """Set the limits of a root, in the place of any others. On the disk on return.

    Raises:
        FullError, UnavailableError: They cannot be written.
    """
    replace_document(root.layout.limits, document, os_calls=root.os_calls, mode=root.document_mode)


def remove_limits(root: Root) -> bool:
    """Remove the limits of a root; return whether there were any.

    Raises:
        UnavailableError: They cannot be removed.
    """
    path = root.layout.limits
    try:
        root.os_calls.unlink(path)
    except OSError as error:
        if is_missing(error):
            return False
        raise translate(error, doing="remove", path=path) from error
    return True
