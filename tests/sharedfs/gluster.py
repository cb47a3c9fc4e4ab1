"""A real shared filesystem for tests: a GlusterFS volume of one brick, mounted over FUSE several times.

    brick directory <── glusterfsd (server) <── unix socket ── glusterfs (client) ── FUSE ── mount "a"
                                            <── unix socket ── glusterfs (client) ── FUSE ── mount "b"

Each mount has a client process and kernel caches of its own, so it sees what another one does as another
host would: late, through its caches. The translators are those that glusterd puts into a new volume; the
volume files are written here, so no daemon of the system is asked, no port opened and nothing kept outside
one directory. Bricks are one, since volumes of two hang in storms of renames.

Every process is tied to this one (PR_SET_PDEATHSIG): when the test run is killed, the kernel kills the
clients and then aborts what waits on their mounts. What is then left, dead mounts, ``clear_dead_mounts``
takes away. Every wait has a limit. Root only.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["PREFIX", "Mount", "Volume", "clear_dead_mounts", "is_installed", "prepare"]

REPO = Path(__file__).resolve().parents[2]
SETUP_S = 300.0

START_S = 20.0
"""A server and a client are up in a second; a busy machine takes longer."""
STOP_S = 5.0
PREFIX = "prefixstore-volume-"
"""How the directory of every volume begins, to tell our mounts in /proc/mounts."""

SERVER = """\
volume posix
    type storage/posix
    option directory {brick}
end-volume
volume access-control
    type features/access-control
    subvolumes posix
end-volume
volume locks
    type features/locks
    subvolumes access-control
end-volume
volume upcall
    type features/upcall
    option cache-invalidation off
    subvolumes locks
end-volume
volume brick
    type performance/io-threads
    subvolumes upcall
end-volume
volume server
    type protocol/server
    option transport-type socket
    option transport.address-family unix
    option transport.socket.listen-path {socket}
    option auth.addr.brick.allow *
    subvolumes brick
end-volume
"""
CLIENT = """\
volume client
    type protocol/client
    option transport-type socket
    option transport.address-family unix
    option transport.socket.connect-path {socket}
    option remote-host localhost
    option remote-subvolume brick
    option send-gids true
end-volume
volume utime
    type features/utime
    option noatime on
    subvolumes client
end-volume
volume write-behind
    type performance/write-behind
    subvolumes utime
end-volume
volume open-behind
    type performance/open-behind
    subvolumes write-behind
end-volume
volume quick-read
    type performance/quick-read
    subvolumes open-behind
end-volume
volume md-cache
    type performance/md-cache
    subvolumes quick-read
end-volume
volume {name}
    type performance/io-threads
    subvolumes md-cache
end-volume
"""


def is_installed() -> bool:
    """Whether this machine has the programs, the device and the permission that a volume takes."""
    programs = ("glusterfs", "glusterfsd", "setpriv", "umount")
    return (
        os.geteuid() == 0
        and Path("/dev/fuse").exists()
        and all(shutil.which(name) for name in programs)
    )


def prepare() -> None:
    """Install what a volume takes and take away what a killed run left; skips where neither can be had."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    if not is_installed():
        subprocess.run([REPO / "tools" / "sharedfs-setup"], check=True, timeout=SETUP_S)
    clear_dead_mounts()


def _new_directory() -> Path:
    """Make a directory with a short path, in memory where there is some: a brick is many small files."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=memory if memory.is_dir() else None))


@dataclass
class Mount:
    """One mount of a volume: one host.

    Attributes:
        path: The mount point.
        process: The client process.
        options: What the client was started with, to mount again.
    """

    path: Path
    process: subprocess.Popen[bytes]
    options: tuple[str, ...]

    @contextlib.contextmanager
    def hanging(self, *, limit_s: float = 60.0) -> Iterator[None]:
        """Stop the client, so that every call on the mount hangs, for the length of a block.

        Args:
            limit_s: It goes on after this in any case: a test that touches the mount by mistake fails
                rather than hang.
        """
        watchdog = threading.Timer(limit_s, self.process.send_signal, (signal.SIGCONT,))
        watchdog.daemon = True
        watchdog.start()
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            watchdog.cancel()
            self.process.send_signal(signal.SIGCONT)


@dataclass
class Volume:
    """A running volume; ``close`` ends it.

    Attributes:
        directory: Holds all that it consists of, the brick's files included. A new one with a short path by
            default: a socket's path is short.
        mounts: Its mounts by name.
    """

    directory: Path = field(default_factory=_new_directory)
    mounts: dict[str, Mount] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None

    @property
    def brick(self) -> Path:
        """What the server has on its disk; tests look here past every cache."""
        return self.directory / "brick"

    def start(self) -> None:
        """Start the server."""
        self.brick.mkdir(parents=True)
        socket = self.directory / "socket"
        assert len(str(socket)) < 100, f"{socket} is too long for a socket's name"
        file = self.directory / "server.vol"
        file.write_text(SERVER.format(brick=self.brick, socket=socket))
        self._server = self._run(
            ["glusterfsd", "--no-daemon", f"--volfile={file}"], log=self.directory / "server.log"
        )
        _wait_until(socket.exists, "the server", self.directory / "server.log", self._server)

    def mount(self, name: str, options: Sequence[str] = ()) -> Mount:
        """Mount the volume once more.

        Args:
            name: What to call this host.
            options: Options of the client, such as ``--attribute-timeout=30``.
        """
        path = self.directory / name
        path.mkdir(exist_ok=True)
        file = self.directory / f"{name}.vol"
        file.write_text(CLIENT.format(socket=self.directory / "socket", name=name))
        log = self.directory / f"{name}.log"
        process = self._run(
            [
                "glusterfs",
                "--no-daemon",
                f"--volfile={file}",
                *options,
                str(path),
            ],
            log=log,
        )
        self.mounts[name] = Mount(path, process, tuple(options))
        _wait_until(lambda: _is_mounted(path), f"the mount {name}", log, process)
        # The mount is there before the client has met its server.
        _wait_until(lambda: _answers(path), f"the client of {name}", log, process)
        return self.mounts[name]

    def unmount(self, name: str) -> None:
        """Take a mount away, whatever hangs on it, as an operator who has lost patience does."""
        mount = self.mounts.pop(name)
        # Killed, not asked: the kernel then aborts all that waits on the mount. SIGKILL also ends a
        # process that is stopped.
        mount.process.kill()
        mount.process.wait(STOP_S)
        _detach(mount.path)

    def remount(self, name: str) -> Mount:
        """Take a mount away and mount it again at the same place with the same options."""
        options = self.mounts[name].options
        self.unmount(name)
        return self.mount(name, options)

    def close(self) -> None:
        """End it all and remove what it has stored."""
        for name in list(self.mounts):
            self.unmount(name)
        if self._server is not None:
            self._server.kill()
            self._server.wait(STOP_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, command: list[str], *, log: Path) -> subprocess.Popen[bytes]:
        program, *arguments = command
        # Dies with this process, however that dies: no server outlives a test run.
        tied = ["setpriv", "--pdeathsig", "KILL", program, f"--log-file={log}", *arguments]
        return subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def clear_dead_mounts() -> None:
    """Take away mounts of ours whose client is gone: a test run was killed."""
    for path in _mounted():
        if not _is_served(path):
            _detach(path)


def _mounted() -> Iterator[Path]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, name, kind, *_ = line.split()
        path = Path(name)
        if kind == "fuse.glusterfs" and path.parent.name.startswith(PREFIX):
            yield path


def _is_served(path: Path) -> bool:
    """Whether any client runs for a mount point; asked of the process table, since a mount may hang."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = cmdline.read_bytes().split(b"\0")
            if b"glusterfs" in arguments[0] and os.fsencode(path) in arguments:
                return True
    return False


def _is_mounted(path: Path) -> bool:
    return path in _mounted()


def _answers(path: Path) -> bool:
    """Whether a mount answers a look into it, asked in a child that may hang."""
    try:
        child = subprocess.run(["ls", path], capture_output=True, timeout=2, check=False)
    except subprocess.TimeoutExpired:
        return False
    return child.returncode == 0


def _detach(path: Path) -> None:
    subprocess.run(["umount", "--lazy", path], capture_output=True, timeout=STOP_S, check=False)


def _wait_until(
    condition: Callable[[], bool], what: str, log: Path, process: subprocess.Popen[bytes]
) -> None:
    end_s = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > end_s or process.poll() is not None:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
            raise RuntimeError(f"{what} did not come up in {START_S} s:\n{tail}")
        time.sleep(0.02)
