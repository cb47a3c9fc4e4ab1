"""The I/O process's threads: fixed pools, one for each kind of request, so that none waits for another.

A thread that hangs in the kernel is not replaced; the engine's side notices and replaces the process.
"""

import contextlib
import queue
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from prefixstore.clock import Clock
from prefixstore.ioproc.messages import (
    PACKET_BYTES_MAX,
    Reply,
    Request,
    decode_packet,
    encode,
    request_decoder,
)

__all__ = ["LanePool", "Pool", "QueuePool"]

Answer = Callable[[Request], Reply | None]


class Pool(ABC):
    """Threads that answer requests; subclasses say where those come from and replies go."""

    def __init__(self, *, name: str, threads: int, answer: Answer) -> None:
        self._answer = answer
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def finish(self, *, until_s: float, clock: Clock) -> None:
        """Answer what is queued, then end the threads; give up at ``until_s``."""
        self._end_requests()
        for thread in self._threads:
            thread.join(timeout=max(0.0, until_s - clock.monotonic_s()))

    @abstractmethod
    def _end_requests(self) -> None:
        """Let every thread meet an end behind the requests that are queued."""

    @abstractmethod
    def _run(self) -> None:
        """Answer until there is an end."""


class QueuePool(Pool):
    """Answers what another thread of the process puts in, in order of arrival."""

    def __init__(
        self, *, name: str, threads: int, answer: Answer, send: Callable[[Reply], None]
    ) -> None:
        super().__init__(name=name, threads=threads, answer=answer)
        self._send = send
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def put(self, request: Request) -> None:
        """Queue one request; bounded by the engine's outstanding ones."""
        self._queue.put(request)

    def _end_requests(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        while (request := self._queue.get()) is not None:
            reply = self._answer(request)
            if reply is not None:
                self._send(reply)


class LanePool(Pool):
    """Answers what comes on a lane, from the lane and to it; bounded by the arena's buffers."""

    def __init__(self, lane: socket.socket, *, name: str, threads: int, answer: Answer) -> None:
        super().__init__(name=name, threads=threads, answer=answer)
        self._lane = lane

    def _end_requests(self) -> None:
        # What is queued is received all the same, and only then the end.
        with contextlib.suppress(OSError):
            self._lane.shutdown(socket.SHUT_RD)

    def _run(self) -> None:
        decoder = request_decoder()
        while packet := self._receive():
            reply = self._answer(decode_packet(decoder, packet))
            if reply is not None:
                # A failed send means that the engine is gone; the main thread learns it by itself.
                with contextlib.suppress(OSError):
                    self._lane.send(encode(reply))

    def _receive(self) -> bytes:
        """Wait for one packet; empty at the end."""
        while True:
            try:
                return self._lane.recv(PACKET_BYTES_MAX)
            except ConnectionResetError:
                # Told once, when the engine was killed with replies unread: its requests still wait.
                continue
            except OSError:
                return b""
