"""How the engine's side talks to the I/O process: one stream, and a lane for each kind of transfer.

The **stream** carries what is rare or long: opening, lookups, touches, counters. A **lane** is a socket
on which one packet is one message, so that any number of threads of the I/O process wait on it, the
kernel hands each request to one of them, and each sends its own reply: no thread in between, no lock.

Sending and receiving never block; what a socket does not take now waits in an outbox. Not thread-safe.
"""

import socket
from abc import ABC, abstractmethod
from collections import deque

from prefixstore.ioproc.messages import (
    PACKET_BYTES_MAX,
    FrameReader,
    Reply,
    Request,
    decode_packet,
    encode,
    encode_frame,
    reply_decoder,
)

__all__ = ["Channel", "Lane", "Stream"]

RECEIVE_BYTES = 2**16


class Channel(ABC):
    """The engine's end of one socket.

    Attributes:
        socket: Readable when replies wait; register it with a selector.
        outbox_bytes: Requests that the socket has not taken.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end
        self.outbox_bytes = 0
        self._outbox: deque[memoryview] = deque()

    @abstractmethod
    def send(self, request: Request) -> None:
        """Queue one request and write what the socket takes now."""

    @abstractmethod
    def receive(self) -> tuple[list[Reply], bool]:
        """Read what has arrived. Returns the replies and whether the socket is still open."""

    def flush(self) -> None:
        """Write what the socket takes now; a broken one shows at the next ``receive``."""
        try:
            while self._outbox:
                frame = self._outbox[0]
                sent = self.socket.send(frame)
                self.outbox_bytes -= sent
                if sent < len(frame):
                    self._outbox[0] = frame[sent:]
                    return
                self._outbox.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()
            self.outbox_bytes = 0

    def _put(self, data: bytes) -> None:
        self._outbox.append(memoryview(data))
        self.outbox_bytes += len(data)
        self.flush()


class Stream(Channel):
    """Frames of any length, in order."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self._reader = FrameReader(reply_decoder())

    def send(self, request: Request) -> None:
        """Queue one request and write what the socket takes now."""
        self._put(encode_frame(request))

    def receive(self) -> tuple[list[Reply], bool]:
        """Read what has arrived.

        Raises:
            InvalidError: The child does not speak our protocol.
        """
        replies: list[Reply] = []
        while True:
            try:
                data = self.socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return replies, True
            except OSError:
                return replies, False
            if not data:
                return replies, False
            replies.extend(self._reader.feed(data))
            if len(data) < RECEIVE_BYTES:
                return replies, True


class Lane(Channel):
    """One packet, one message; packets keep no order among the threads that answer them."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self._decoder = reply_decoder()

    def send(self, request: Request) -> None:
        """Queue one request and write what the socket takes now."""
        self._put(encode(request))

    def receive(self) -> tuple[list[Reply], bool]:
        """Read what has arrived.

        Raises:
            InvalidError: The child does not speak our protocol.
        """
        replies: list[Reply] = []
        while True:
            try:
                data = self.socket.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                return replies, True
            except OSError:
                return replies, False
            if not data:
                return replies, False
            replies.append(decode_packet(self._decoder, data))
