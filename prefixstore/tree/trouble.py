"""What an error of the filesystem means to us. Pure: errno in, meaning out."""

import errno

from prefixstore.errors import FullError, PrefixStoreError, UnavailableError

__all__ = ["is_absence", "is_full", "is_missing", "lacks_links", "translate"]

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})
_ABSENT = _MISSING | {errno.ESTALE}
"""ESTALE: the server forgot the file under our handle, since another host removed it."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
)
_ADVICE = {
    errno.EACCES: "check its owner, group and mode against the user that runs the engine",
    errno.EPERM: "check its owner, group and mode against the user that runs the engine",
    errno.EROFS: "the mount is read-only: set read_only, or remount it",
    errno.EIO: "the storage or the connection to it failed: look at the kernel's log",
    errno.ENOTCONN: "the mount lost its server: remount it",
    errno.ESTALE: "the mount lost its server: remount it",
    errno.ETIMEDOUT: "the server does not answer",
    errno.ENOENT: "is the filesystem mounted?",
    errno.ENOSPC: "free space, or lower max_bytes so that eviction starts earlier",
    errno.EDQUOT: "raise the quota of the filesystem, or lower max_bytes below it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ELOOP: "a symbolic link lies where the store keeps a file: remove it",
}


def is_absence(error: OSError) -> bool:
    """Whether an error, from any call on a blob, says that the blob is not there."""
    return error.errno in _ABSENT


def is_missing(error: OSError) -> bool:
    """Whether an error says that a name is not there: for what must not be taken for missing lightly.

    ESTALE does not: a directory's handle goes stale when its server restarts, and a document's when
    another host replaces it.
    """
    return error.errno in _MISSING


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room."""
    return error.errno in _FULL


def lacks_links(error: OSError) -> bool:
    """Whether an error says that this filesystem has no hard links."""
    return error.errno in _NO_LINKS


def translate(error: OSError, *, doing: str, path: str) -> PrefixStoreError:
    """Return our error for one of the system's: what was done, to what, and what to do next."""
    kind = FullError if is_full(error) else UnavailableError
    name = errno.errorcode.get(error.errno or 0, "?")
    advice = _ADVICE.get(error.errno or 0)
    message = f"cannot {doing} {path}: {error.strerror or error} ({name})"
    return kind(error.errno, f"{message}; {advice}" if advice else message)
