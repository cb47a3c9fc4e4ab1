"""One run of the I/O process: start it, talk to it without ever blocking, kill it.

Not thread-safe: its owner, the pump thread of ``prefixstore.ioproc.client``, is the only caller.
A process that was killed while a thread of it hangs in the kernel stays a zombie-to-be until the mount
lets go; ``reaped`` tells, and the owner bounds how many of those it accepts.
"""

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Self

from prefixstore.errors import UnavailableError
from prefixstore.ioproc.arena import Arena
from prefixstore.ioproc.messages import (
    FrameReader,
    Reply,
    Request,
    encode_frame,
    reply_decoder,
)

__all__ = ["IoProcess"]

RECEIVE_BYTES = 2**16
OUTBOX_BYTES_MAX = 64 * 2**20
"""Requests that a stopped process has not read; beyond this it is treated as gone."""

DAMAGE_SIGNALS = frozenset({signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT})
"""How a process dies of a damaged index: the next one starts without it."""


class IoProcess:
    """A running child with its stream and its arena.

    Attributes:
        arena: The buffers shared with this child; they die with it.
        stream: Readable when replies wait; register it with a selector.
    """

    def __init__(self, child: subprocess.Popen[bytes], stream: socket.socket, arena: Arena) -> None:
        self.arena = arena
        self.stream = stream
        self._child = child
        self._reader = FrameReader(reply_decoder())
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0

    @classmethod
    def start(cls, *, buffer_count: int, buffer_bytes: int) -> Self:
        """Start a child with a fresh arena.

        Raises:
            UnavailableError: The machine has no memory, file descriptors or processes left.
        """
        arena: Arena | None = None
        try:
            arena = Arena.create(count=buffer_count, payload_bytes=buffer_bytes)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                child = subprocess.Popen(  # noqa: S603 - our own module, our own interpreter
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "prefixstore.ioproc.server",
                        str(theirs.fileno()),
                        str(arena.fd),
                    ],
                    pass_fds=(theirs.fileno(), arena.fd),
                    stdin=subprocess.DEVNULL,
                    env=_child_environment(),
                    # Signals to the engine's group are the engine's; the end of the stream is ours.
                    start_new_session=True,
                )
        except OSError as error:
            if arena is not None:
                arena.close()
            raise UnavailableError(
                error.errno, f"cannot start the I/O process: {error.strerror}"
            ) from error
        ours.setblocking(False)
        return cls(child, ours, arena)

    @property
    def wants_to_send(self) -> bool:
        """Whether requests wait for the stream to become writable."""
        return bool(self._outbox)

    @property
    def overflowed(self) -> bool:
        """Whether the child has stopped reading for so long that it counts as gone."""
        return self._outbox_bytes > OUTBOX_BYTES_MAX

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def send(self, request: Request) -> None:
        """Queue one request and write what the stream takes now."""
        frame = encode_frame(request)
        self._outbox.append(memoryview(frame))
        self._outbox_bytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Write what the stream takes now; a broken stream shows at the next ``receive``."""
        try:
            while self._outbox:
                frame = self._outbox[0]
                sent = self.stream.send(frame)
                self._outbox_bytes -= sent
                if sent < len(frame):
                    self._outbox[0] = frame[sent:]
                    return
                self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()
            self._outbox_bytes = 0

    def receive(self) -> tuple[list[Reply], bool]:
        """Read what has arrived. Returns the replies and whether the stream is still open."""
        replies: list[Reply] = []
        while True:
            try:
                data = self.stream.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return replies, True
            except OSError:
                return replies, False
            if not data:
                return replies, False
            replies.extend(self._reader.feed(data))

    def reaped(self) -> bool:
        """Whether the child has left the process table, with all its threads."""
        return self._child.poll() is not None

    def died_of_damage(self) -> bool:
        """Whether the child's end looks like a damaged index rather than an order to leave."""
        code = self._child.poll()
        return code is not None and -code in DAMAGE_SIGNALS

    def wait(self, timeout_s: float) -> bool:
        """Wait for the child to leave; returns whether it has."""
        try:
            self._child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Send SIGKILL and let go of the stream and the arena, without waiting.

        The child can never touch anything of the engine's: it knows only the arena, and that lives
        on for as long as the child does.
        """
        self._child.kill()
        self.stream.close()
        self.arena.close()


def _child_environment() -> dict[str, str]:
    """The engine's environment, with this very package first on the child's path."""
    package_parent = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = (
        f"{package_parent}{os.pathsep}{inherited}" if inherited else package_parent
    )
    return environment
