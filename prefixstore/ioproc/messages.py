"""What the engine's side and the I/O process say to each other.

Each message is one MessagePack document of a type below, chosen by its tag. Loads, stores and their
replies travel as packets, all else in frames on a stream: a little-endian u32 length, then the document.
No pickle: what does not fit its type is refused, and the peer with it. Payload bytes never travel here;
they lie in the arena, named by a buffer's number.

``ticket`` is chosen by the engine's side and comes back in the reply; each request but ``Touch``,
``Configure`` and ``Stop`` has exactly one reply. Deadlines are absolute, on the monotonic clock, which
all processes of a host share.
"""

import struct
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

import msgspec

from prefixstore.errors import InvalidError

__all__ = [
    "FRAME_BYTES_MAX",
    "PACKET_BYTES_MAX",
    "Configure",
    "Counters",
    "Find",
    "Found",
    "FrameReader",
    "Gone",
    "Load",
    "Loaded",
    "Opened",
    "Reply",
    "Request",
    "State",
    "Stop",
    "Store",
    "Stored",
    "Touch",
    "decode_packet",
    "encode",
    "encode_frame",
    "reply_decoder",
    "request_decoder",
]

FRAME_BYTES_MAX = 96 * 2**20
"""Bounds what a broken peer can make us reserve: a chain of a million keys still fits."""
PACKET_BYTES_MAX = 2048
"""Two keys, some numbers and a reason: longer packets would be cut, and then refused."""

State = Literal["on", "read_only", "opening", "off"]
"""What the store can do now. ``opening``: the root has not answered yet."""


class Configure(msgspec.Struct, tag=0, frozen=True, kw_only=True, array_like=True):
    """The first request: what to open, and the arena's shape (its memory came by inheritance)."""

    root: str
    namespace: bytes | None
    """The namespace's fields as JSON, since their exact values decide the namespace id."""
    options: bytes
    """The ``StoreConfig``, as JSON."""
    buffer_count: int
    buffer_bytes: int
    load_threads: int
    store_threads: int
    discard_index: bool
    create: bool
    """Make the root if it is not there. Not once it was: then its mount is away, and will be back."""


class Find(msgspec.Struct, tag=1, frozen=True, kw_only=True, array_like=True):
    """Which of these keys are stored?

    With ``chained``, the keys are a prefix's, in order, and what follows the first missing one is
    reported missing without a look. Without, the most useful go first: not all may be looked for.
    """

    ticket: int
    keys: list[bytes]
    chained: bool
    deadline_s: float


class Load(msgspec.Struct, tag=2, frozen=True, kw_only=True, array_like=True):
    """Read and verify one chunk into a buffer's payload."""

    ticket: int
    key: bytes
    buffer: int
    raw_bytes: int
    deadline_s: float


class Store(msgspec.Struct, tag=3, frozen=True, kw_only=True, array_like=True):
    """Publish one chunk from a buffer's payload."""

    ticket: int
    key: bytes
    parent: bytes | None
    end_token: int
    element_bytes: int
    buffer: int
    raw_bytes: int


class Touch(msgspec.Struct, tag=4, frozen=True, kw_only=True, array_like=True):
    """These keys were used just now. No reply."""

    keys: list[bytes]


class Stop(msgspec.Struct, tag=5, frozen=True, kw_only=True, array_like=True):
    """Finish what is queued, close the store, leave. No reply but the end of the stream."""


class Opened(msgspec.Struct, tag=10, frozen=True, kw_only=True, array_like=True):
    """The store's state changed; ``reason`` is a sentence for people."""

    state: State
    reason: str


class Found(msgspec.Struct, tag=11, frozen=True, kw_only=True, array_like=True):
    """The answer to ``Find``: one byte for each key, 1 where it is stored."""

    ticket: int
    present: bytes


class Loaded(msgspec.Struct, tag=12, frozen=True, kw_only=True, array_like=True):
    """The answer to ``Load``: the buffer holds the verified payload unless ``reason`` says why not."""

    ticket: int
    reason: str | None
    stored_bytes: int
    elapsed_s: float


class Stored(msgspec.Struct, tag=13, frozen=True, kw_only=True, array_like=True):
    """The answer to ``Store``; ``reason`` is set when the chunk was skipped."""

    ticket: int
    existed: bool
    reason: str | None
    stored_bytes: int
    elapsed_s: float


class Gone(msgspec.Struct, tag=15, frozen=True, kw_only=True, array_like=True):
    """These chunks are not there any more: evicted, damaged, or missed where they were promised."""

    keys: list[bytes]


class Counters(msgspec.Struct, tag=14, frozen=True, kw_only=True, array_like=True):
    """The store's counters since it was opened, by name."""

    values: dict[str, int]


Request = Configure | Find | Load | Store | Touch | Stop
Reply = Opened | Found | Loaded | Stored | Gone | Counters

M = TypeVar("M")

_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Request | Reply) -> bytes:
    """Encode one message as a packet."""
    return _ENCODER.encode(message)


def decode_packet(decoder: msgspec.msgpack.Decoder[M], packet: bytes) -> M:
    """Decode one message.

    Raises:
        InvalidError: The peer does not speak this protocol.
    """
    try:
        return decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise InvalidError(f"{len(packet)} bytes are no message: {error}") from error


def encode_frame(message: Request | Reply) -> bytes:
    """Encode one message with its length before it."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[M]):
    """Cuts a stream of bytes into messages of one direction. Not thread-safe.

    >>> reader = FrameReader(request_decoder())
    >>> list(reader.feed(encode_frame(Stop())))
    [Stop()]
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """Take bytes as they came; yield each message they complete.

        Raises:
            InvalidError: The peer does not speak this protocol; the stream is of no more use.
        """
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            if length > FRAME_BYTES_MAX:
                raise InvalidError(f"a frame of {length} bytes, at most {FRAME_BYTES_MAX} expected")
            end = _LENGTH.size + length
            if len(self._pending) < end:
                return
            body = bytes(self._pending[_LENGTH.size : end])
            del self._pending[:end]
            yield decode_packet(self._decoder, body)


def request_decoder() -> msgspec.msgpack.Decoder[Request]:
    """Return a decoder of what the engine's side sends."""
    return msgspec.msgpack.Decoder(Request)


def reply_decoder() -> msgspec.msgpack.Decoder[Reply]:
    """Return a decoder of what the I/O process sends."""
    return msgspec.msgpack.Decoder(Reply)
