"""Which filesystems an LMDB environment may live on: those of one kernel, told by statfs.

LMDB maps its file and locks it with memory and POSIX locks, which hold among the processes of one
kernel and nowhere else (lmdb.h: not on remote filesystems, "even between processes on the same
host"). The list names what is known to be local, because an unknown filesystem is more often a new
network filesystem than a new disk format. FUSE is refused whole: it may be anything.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from prefixstore.errors import InvalidError, UnavailableError

__all__ = ["Filesystem", "check_local", "filesystem_of", "nearest_existing"]

LOCAL = {
    0x0000EF53: "ext4",  # and ext2, ext3
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x3153464A: "jfs",
    0x00003434: "nilfs2",
    0x52654973: "reiserfs",
}

NOT_LOCAL = {
    0x00006969: "nfs",
    0x65735546: "fuse",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x0000517B: "smb",
    0x01021997: "9p",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x00C36400: "ceph",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x7461636F: "ocfs2",
    0x01161970: "gfs2",
    0x20030528: "orangefs",
    0x786F4256: "vboxsf",
    0xBACBACBC: "vmhgfs",
}
"""Named for the message alone; whatever is not in ``LOCAL`` is refused."""

STATFS_BYTES = 256
"""More than any Linux ABI's struct statfs (120 bytes on 64-bit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """What statfs says of a path: the filesystem's name, and whether one kernel owns it."""

    name: str
    local: bool


def named(magic: int) -> Filesystem:
    """Name a filesystem by its statfs magic.

    >>> named(0x6969)
    Filesystem(name='nfs', local=False)
    """
    if magic in LOCAL:
        return Filesystem(name=LOCAL[magic], local=True)
    return Filesystem(name=NOT_LOCAL.get(magic, f"unknown, magic {magic:#x}"), local=False)


def filesystem_of(path: Path) -> Filesystem:
    """Ask the kernel what ``path`` is on; the path must exist.

    Raises:
        UnavailableError: The kernel does not say.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(STATFS_BYTES)
    if libc.statfs(os.fsencode(path), buffer):
        code = ctypes.get_errno()
        raise UnavailableError(
            code, f"cannot tell the filesystem of the index: {os.strerror(code)}", os.fspath(path)
        )
    # f_type is the first member of the struct, a C long.
    magic = int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF
    return named(magic)


def nearest_existing(path: Path) -> Path:
    """Return ``path`` or its closest ancestor that exists: a directory will be made on that one."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def check_local(path: Path, filesystem: Filesystem) -> None:
    """Refuse a filesystem that LMDB must not live on.

    Raises:
        InvalidError: It names the path, the filesystem and what to set.
    """
    if not filesystem.local:
        raise InvalidError(
            f"the index needs a local filesystem, {path} is on {filesystem.name}: "
            "set index_dir to a directory on this host's own disk or memory, "
            "for example under /var/tmp or /dev/shm"
        )
