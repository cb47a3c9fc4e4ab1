"""The errors of prefixstore, one class for each thing a caller can do about them.

    PrefixStoreError
    ├── InvalidError      fix the call, the option or the file it names   (is a ValueError)
    ├── UnavailableError  the root or the index cannot be reached: retry  (is an OSError)
    ├── FullError         no space or quota left: skip the store          (is an OSError)
    ├── CorruptError      these bytes are not what they claim: a miss     (is a ValueError)
    └── ClosedError       the object was closed: a bug in the caller      (is a RuntimeError)

A miss is not an error: lookups and loads return it as a value. Nothing here is raised into vLLM;
``prefixstore.vllm`` turns each into a miss or a skipped store, and counts it.
"""

__all__ = [
    "ClosedError",
    "CorruptError",
    "FullError",
    "InvalidError",
    "PrefixStoreError",
    "UnavailableError",
]


class PrefixStoreError(Exception):
    """The base of every error that prefixstore raises on purpose."""


class InvalidError(PrefixStoreError, ValueError):
    """A call, an option or a document is wrong; the message says what to change."""


class UnavailableError(PrefixStoreError, OSError):
    """The root, a mount or the index cannot be reached now; a later try may succeed."""


class FullError(PrefixStoreError, OSError):
    """The filesystem or its quota has no room; loads still work."""


class CorruptError(PrefixStoreError, ValueError):
    """Bytes failed a check: they are never served.

    Attributes:
        reason: A short, stable name of the failed check, fit for a metric label.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ClosedError(PrefixStoreError, RuntimeError):
    """The object was used after ``close()``."""
