"""A real NFS version 3 server, and a client of it in this process: no kernel, no mount.

    PrefixStore ── NfsOs ── libnfs (by ctypes) ── TCP ── nfs-ganesha (VFS) ── export directory

Each ``NfsOs`` is a client with a connection of its own: one host. libnfs keeps no caches, so what is shown
here is the protocol (exclusive creation, links, errors, handles that go stale, the server's clock), not what the
kernel's client remembers; the mounts of ``gluster.py`` and ``prefixstore.testing.hosts`` show that.

The server registers its ports with rpcbind and does not start without, so one is started if none runs. Root
only. Every process is tied to this one but rpcbind, which changes its user; ``close`` ends it.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import socket
import stat as stat_bits
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixstore.tree.osfs import Entry, Space, Stat

__all__ = ["NfsOs", "Server", "is_installed"]

START_S = 20.0
STOP_S = 5.0
LIBRARIES = ("libnfs.so.13", "libnfs.so.14")
CONFIG = """\
NFS_CORE_PARAM {{
    Protocols = 3;
    NFS_Port = {nfs_port};
    MNT_Port = {mount_port};
    Enable_UDP = false;
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Bind_addr = 127.0.0.1;
}}
EXPORT {{
    Export_Id = 1;
    Path = "{export}";
    Pseudo = "/export";
    Access_Type = RW;
    Squash = No_Root_Squash;
    SecType = sys;
    Protocols = 3;
    Transports = TCP;
    FSAL {{ Name = VFS; }}
}}
"""


def is_installed() -> bool:
    """Whether this machine has the server, the client library and the permission that they take."""
    programs = ("ganesha.nfsd", "rpcbind", "setpriv")
    return os.geteuid() == 0 and all(map(shutil.which, programs)) and _library() is not None


def _library() -> ctypes.CDLL | None:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@dataclass
class Server:
    """A running server; ``close`` ends it.

    Attributes:
        directory: Holds all that it consists of.
        export: What it serves, on this machine's disk: tests look here past the protocol.
    """

    # Not in memory: the server names files by handles, which tmpfs does not have for long.
    directory: Path = field(
        default_factory=lambda: Path(tempfile.mkdtemp(prefix="prefixstore-nfs-"))
    )
    nfs_port: int = 0
    mount_port: int = 0
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _alone: Any = None

    @property
    def export(self) -> Path:
        """The directory that is exported."""
        return self.directory / "export"

    def start(self) -> None:
        """Start the server, and rpcbind if there is none."""
        # Two servers of one version cannot both be registered: test runs take turns.
        self._alone = Path(tempfile.gettempdir(), "prefixstore-nfs.lock").open("w")  # noqa: SIM115
        fcntl.flock(self._alone, fcntl.LOCK_EX)
        self.export.mkdir(parents=True)
        self.nfs_port, self.mount_port = _free_ports(2)
        if not _listens(111):
            self._run(["rpcbind", "-f"], until=lambda: _listens(111))
        config = self.directory / "ganesha.conf"
        config.write_text(
            CONFIG.format(nfs_port=self.nfs_port, mount_port=self.mount_port, export=self.export)
        )
        files = ["-f", config, "-L", self.directory / "ganesha.log", "-p", self.directory / "pid"]
        self._run(
            ["ganesha.nfsd", "-F", *map(str, files)],
            until=lambda: _listens(self.nfs_port) and _listens(self.mount_port),
        )

    def client(self) -> "NfsOs":
        """Return a new host."""
        return NfsOs(self)

    def close(self) -> None:
        """End it all and remove what it has stored."""
        for process in reversed(self._processes):
            # Asked first: the server then takes its name off rpcbind's list.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._alone.close()

    def _run(self, command: list[str], *, until: Callable[[], bool]) -> None:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        end_s = time.monotonic() + START_S
        while not until():
            if time.monotonic() > end_s or process.poll() is not None:
                log = self.directory / "ganesha.log"
                tail = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
                raise RuntimeError(f"{command[0]} did not come up in {START_S} s:\n{tail}")
            time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class _Stat64(ctypes.Structure):
    """``struct nfs_stat_64``."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in [
            "dev",
            "ino",
            "mode",
            "nlink",
            "uid",
            "gid",
            "rdev",
            "size",
            "blksize",
            "blocks",
            "atime",
            "mtime",
            "ctime",
            "atime_nsec",
            "mtime_nsec",
            "ctime_nsec",
            "used",
        ]
    ]

    def as_stat(self) -> Stat:
        """Return it as the seam's value."""
        return Stat(
            size_bytes=self.size,
            disk_bytes=self.used,
            modified_s=self.mtime + self.mtime_nsec / 1e9,
            inode=self.ino,
            device=self.dev,
            is_file=stat_bits.S_ISREG(self.mode),
            is_directory=stat_bits.S_ISDIR(self.mode),
            mode=stat_bits.S_IMODE(self.mode),
        )


class _Statvfs(ctypes.Structure):
    """``struct statvfs`` of glibc on 64 bits, as far as it is read."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in ["bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"]
    ] + [("rest", ctypes.c_byte * 64)]


class _Dirent(ctypes.Structure):
    """The first fields of ``struct nfsdirent``."""


_Dirent._fields_ = [
    ("next", ctypes.POINTER(_Dirent)),
    ("name", ctypes.c_char_p),
    ("inode", ctypes.c_uint64),
    ("type", ctypes.c_uint32),
]
NF3REG, NF3DIR = 1, 2


class NfsOs:
    """One host: an ``Os`` whose calls go to the server. Paths begin at the export.

    Safe for concurrent use: calls take turns on one connection.
    """

    def __init__(self, server: Server) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self._lock = threading.Lock()
        self._open: dict[int, ctypes.c_void_p] = {}
        self._next_fd = 1_000_000
        for name in ("nfs_init_context", "nfs_parse_url_dir"):
            getattr(library, name).restype = ctypes.c_void_p
        library.nfs_get_error.restype = ctypes.c_char_p
        library.nfs_readdir.restype = ctypes.POINTER(_Dirent)
        self._context = ctypes.c_void_p(library.nfs_init_context())
        url = (
            f"nfs://127.0.0.1{server.export}?version=3&nfsport={server.nfs_port}"
            f"&mountport={server.mount_port}"
        )
        parsed = library.nfs_parse_url_dir(self._context, url.encode())
        assert parsed, self._error()
        library.nfs_destroy_url(ctypes.c_void_p(parsed))
        library.nfs_set_dircache(self._context, 0)
        self._call("mount", str(server.export), b"127.0.0.1", os.fsencode(server.export))

    def close_connection(self) -> None:
        """Let go of the server."""
        self._library.nfs_destroy_context(self._context)

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        handle = ctypes.c_void_p()
        self._call("open2", path, os.fsencode(path), flags, mode, ctypes.byref(handle))
        with self._lock:
            self._next_fd += 1
            self._open[self._next_fd] = handle
            return self._next_fd

    def close(self, fd: int) -> None:
        with self._lock:
            handle = self._open.pop(fd)
        self._call("close", "", handle)

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        memory = (ctypes.c_char * len(target)).from_buffer(target)
        count = ctypes.c_uint64(len(target))
        handle = self._open[fd]
        try:
            return self._call("pread", "", handle, ctypes.c_uint64(offset), count, memory)
        except OSError as error:
            # libnfs calls every failure of a read EFAULT: what the server says of the handle tells more.
            self.stat_open(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        content = bytes(source)
        count = ctypes.c_uint64(len(content))
        return self._call("pwrite", "", self._open[fd], ctypes.c_uint64(offset), count, content)

    def sync_data(self, fd: int) -> None:
        self._call("fsync", "", self._open[fd])

    def sync(self, fd: int) -> None:
        if self.stat_open(fd).is_directory:
            return  # What changes a directory is on the disk when the server answers; kernels know that.
        self._call("fsync", "", self._open[fd])

    def link(self, source: str, target: str) -> None:
        self._call("link", target, os.fsencode(source), os.fsencode(target))

    def rename(self, source: str, target: str) -> None:
        self._call("rename", target, os.fsencode(source), os.fsencode(target))

    def unlink(self, path: str) -> None:
        self._call("unlink", path, os.fsencode(path))

    def stat(self, path: str) -> Stat:
        found = _Stat64()
        self._call("lstat64", path, os.fsencode(path), ctypes.byref(found))
        return found.as_stat()

    def stat_open(self, fd: int) -> Stat:
        found = _Stat64()
        self._call("fstat64", "", self._open[fd], ctypes.byref(found))
        return found.as_stat()

    def scan(self, path: str) -> list[Entry]:
        directory = ctypes.c_void_p()
        self._call("opendir", path, os.fsencode(path), ctypes.byref(directory))
        entries = []
        with self._lock:
            while found := self._library.nfs_readdir(self._context, directory):
                entry = found.contents
                name = os.fsdecode(entry.name)
                if name not in (".", ".."):
                    entries.append(Entry(name, entry.type == NF3REG, entry.type == NF3DIR))
            self._library.nfs_closedir(self._context, directory)
        return entries

    def make_directory(self, path: str, mode: int = 0o777) -> None:
        self._call("mkdir2", path, os.fsencode(path), mode)

    def remove_directory(self, path: str) -> None:
        self._call("rmdir", path, os.fsencode(path))

    def touch(self, path: str) -> None:
        self._call("utimes", path, os.fsencode(path), None)

    def set_mode(self, path: str, mode: int) -> None:
        self._call("chmod", path, os.fsencode(path), mode)

    def space(self, path: str) -> Space:
        found = _Statvfs()
        self._call("statvfs", path, os.fsencode(path), ctypes.byref(found))
        return Space(
            total_bytes=found.frsize * found.blocks,
            free_bytes=found.frsize * found.bavail,
            free_files=found.favail,
        )

    def _call(self, name: str, path: str, *arguments: object) -> int:
        with self._lock:
            result: int = getattr(self._library, f"nfs_{name}")(self._context, *arguments)
            said = self._error() if result < 0 else ""
        if result < 0:
            # libnfs calls a stale handle EIO; the kernel's client says what the server said.
            number = errno.ESTALE if "NFS3ERR_STALE" in said else -result
            raise OSError(number, f"{os.strerror(number)} ({said})", path)
        return result

    def _error(self) -> str:
        return (self._library.nfs_get_error(self._context) or b"").decode(errors="replace")
