"""Whether blobs pass the page cache: tried, never assumed.

Past the page cache (O_DIRECT) a transfer costs no copy and pushes nothing out of memory that the engine
needs. Not every filesystem takes it, and one that does for some files may not for others, so the first
refusal by any call turns it off for the whole tree, and the call is made again without. Offsets, lengths
and memory of blobs are all whole pages, which is the strictest demand there is.
"""

import contextlib
import errno
import mmap
import os
import uuid
from typing import Literal

from prefixstore.blob.header import ALIGN_BYTES
from prefixstore.errors import InvalidError
from prefixstore.tree.osfs import FILE_MODE
from prefixstore.tree.root import Root

__all__ = ["DirectIo"]

_REFUSALS = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


class DirectIo:
    """The state of one tree. Safe for concurrent use: it only ever changes from on to off.

    Attributes:
        flag: What to open a blob with: O_DIRECT or nothing.
    """

    __slots__ = ("_is_demanded", "flag")

    def __init__(self, wanted: Literal["auto", "on", "off"]) -> None:
        self.flag = 0 if wanted == "off" else os.O_DIRECT
        self._is_demanded = wanted == "on"

    def refused(self, error: OSError, *, flag: int) -> bool:
        """Return whether to make a call again, without O_DIRECT from now on.

        Args:
            error: What the call said.
            flag: What ``flag`` was when it was made.
        """
        if not flag or self._is_demanded or error.errno not in _REFUSALS:
            return False
        self.flag = 0
        return True

    def check(self, root: Root) -> None:
        """Try whether a root takes it, if the configuration leaves no choice.

        Raises:
            InvalidError: It does not.
        """
        if not self._is_demanded:
            return
        path = root.layout.probe(uuid.uuid4().hex)
        page = memoryview(mmap.mmap(-1, ALIGN_BYTES))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | self.flag
        try:
            fd = root.os_calls.open(path, flags, FILE_MODE)
            try:
                root.os_calls.write_from(fd, page, 0)
                root.os_calls.read_into(fd, page, 0)
            finally:
                root.os_calls.close(fd)
        except OSError as error:
            raise InvalidError(
                f"direct_io is 'on', but {root.path} refuses O_DIRECT ({error.strerror}): use "
                "'auto' or 'off'"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                root.os_calls.unlink(path)
