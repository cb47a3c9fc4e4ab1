"""Why a load brought nothing: stable names, fit for metric labels."""

from enum import StrEnum

__all__ = ["MissReason"]


class MissReason(StrEnum):
    """The check that failed, or what kept the blob from being read."""

    ABSENT = "absent"
    """There is no such file (any more)."""
    TORN = "torn"
    """The file's length is not the one its header says."""
    HEADER = "header"
    """The header is not a valid one."""
    VERSION = "version"
    """A format version that this reader does not know."""
    NAMESPACE = "namespace"
    """A blob of another namespace lies here."""
    KEY = "key"
    """A blob of another key lies here."""
    SIZE = "size"
    """The payload is not as long as the engine's chunks are."""
    DIGEST = "digest"
    """The payload's bytes are not those that were written."""
    CODEC = "codec"
    """The payload cannot be decoded to its length."""
    IO = "io"
    """The filesystem failed."""
    TIMEOUT = "timeout"
    """The filesystem took too long."""
