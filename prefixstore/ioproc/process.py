"""One run of the I/O process: start it, talk to it without ever blocking, kill it.

Not thread-safe: its owner, ``prefixstore.ioproc.pump``, is the only caller.
A process that was killed while a thread of it hangs in the kernel stays a zombie-to-be until the mount
lets go; ``reaped`` tells, and the owner bounds how many of those it accepts.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from prefixstore.errors import UnavailableError
from prefixstore.ioproc.arena import Arena
from prefixstore.ioproc.channels import Channel, Lane, Stream
from prefixstore.ioproc.messages import Load, Request, Store

__all__ = ["IoProcess"]

OUTBOX_BYTES_MAX = 64 * 2**20
"""Requests that a stopped process has not read; beyond this it is treated as gone."""

DAMAGE_SIGNALS = frozenset({signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT})
"""How a process dies of a damaged index: the next one starts without it."""


class IoProcess:
    """A running child with its channels and its arena.

    Attributes:
        arena: The buffers shared with this child; they die with it.
        channels: All ways to it; replies come on the one that the request went.
    """

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        arena: Arena,
        *,
        stream: socket.socket,
        loads: socket.socket,
        stores: socket.socket,
    ) -> None:
        self.arena = arena
        self._child = child
        self._stream = Stream(stream)
        self._lanes = {Load: Lane(loads), Store: Lane(stores)}
        self.channels: tuple[Channel, ...] = (self._stream, *self._lanes.values())

    @classmethod
    def start(cls, *, buffer_count: int, buffer_bytes: int) -> Self:
        """Start a child with a fresh arena.

        Raises:
            UnavailableError: The machine has no memory, file descriptors or processes left.
        """
        with contextlib.ExitStack() as undo:
            try:
                arena = Arena.create(count=buffer_count, payload_bytes=buffer_bytes)
                undo.callback(arena.close)
                pairs = [
                    socket.socketpair(socket.AF_UNIX, kind)
                    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_SEQPACKET)
                ]
                for ours, _ in pairs:
                    undo.callback(ours.close)
                with contextlib.ExitStack() as theirs:
                    ends = [theirs.enter_context(end) for _, end in pairs]
                    child = _start([*(end.fileno() for end in ends), arena.fd])
            except OSError as error:
                raise UnavailableError(
                    error.errno, f"cannot start the I/O process: {error.strerror}"
                ) from error
            undo.pop_all()
        stream, loads, stores = (ours for ours, _ in pairs)
        return cls(child, arena, stream=stream, loads=loads, stores=stores)

    @property
    def wants_to_send(self) -> bool:
        """Whether requests wait for a channel to become writable."""
        return any(channel.outbox_bytes for channel in self.channels)

    @property
    def overflowed(self) -> bool:
        """Whether the child has stopped reading for so long that it counts as gone."""
        return sum(channel.outbox_bytes for channel in self.channels) > OUTBOX_BYTES_MAX

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def send(self, request: Request) -> None:
        """Queue one request and write what its channel takes now."""
        self._lanes.get(type(request), self._stream).send(request)

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
        """Send SIGKILL and let go of the channels and the arena, without waiting.

        The child can never touch anything of the engine's: it knows only the arena, and that lives
        on for as long as the child does.
        """
        self._child.kill()
        for channel in self.channels:
            channel.socket.close()
        self.arena.close()


def _start(fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the child with the descriptors that it inherits, in the order that it knows."""
    return subprocess.Popen(  # noqa: S603 - our own module, our own interpreter
        [sys.executable, "-P", "-m", "prefixstore.ioproc.server", *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=_child_environment(),
        # Signals to the engine's group are the engine's; the end of the stream is ours.
        start_new_session=True,
    )


def _child_environment() -> dict[str, str]:
    """The engine's environment, with this very package first on the child's path."""
    package_parent = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = (
        f"{package_parent}{os.pathsep}{inherited}" if inherited else package_parent
    )
    return environment
