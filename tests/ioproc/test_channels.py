"""Lanes between the engine's side and the I/O process: packets, whole and never lost while both live."""

import socket
from collections.abc import Iterator

import pytest

from prefixstore.clock import SystemClock
from prefixstore.errors import InvalidError
from prefixstore.ioproc.channels import Lane, Stream
from prefixstore.ioproc.messages import (
    PACKET_BYTES_MAX,
    Load,
    Loaded,
    Store,
    Stored,
    decode_packet,
    encode,
    request_decoder,
)
from prefixstore.ioproc.pools import LanePool

PATIENCE_S = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give the two ends of a lane."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(PATIENCE_S)
        yield ours, theirs


def load(ticket: int) -> Load:
    """Return a request for a chunk."""
    return Load(ticket=ticket, key=b"k" * 36, buffer=0, raw_bytes=10, deadline_s=1.0)


def loaded(ticket: int) -> Loaded:
    """Return the answer to ``load(ticket)``."""
    return Loaded(ticket=ticket, reason=None, stored_bytes=10, elapsed_s=0.5)


def answer(request: object) -> Loaded:
    """Answer a load."""
    assert isinstance(request, Load)
    return loaded(request.ticket)


def test_the_longest_messages_of_a_lane_fit_a_packet():
    """Keys of the largest size, numbers of the largest value and a reason leave room to spare."""
    largest = 2**63 - 1
    store = Store(
        ticket=largest,
        key=b"k" * 64,
        parent=b"p" * 64,
        end_token=largest,
        element_bytes=16,
        buffer=largest,
        raw_bytes=largest,
    )
    stored = Stored(
        ticket=largest, existed=True, reason="x" * 100, stored_bytes=largest, elapsed_s=1e300
    )

    assert max(len(encode(store)), len(encode(stored))) < PACKET_BYTES_MAX / 2


def test_requests_that_a_lane_does_not_take_wait_in_order(pair):
    """A process that stands still blocks nobody; what it was sent meanwhile arrives afterwards."""
    ours, theirs = pair
    lane = Lane(ours)
    sent = 0
    while not lane.outbox_bytes:
        lane.send(load(sent))
        sent += 1
    lane.send(load(sent))

    decoder = request_decoder()
    tickets = []
    for _ in range(sent + 1):
        tickets.append(decode_packet(decoder, theirs.recv(PACKET_BYTES_MAX)).ticket)
        lane.flush()

    assert list(range(sent + 1)) == tickets
    assert lane.outbox_bytes == 0


def test_replies_of_several_packets_are_received_at_once(pair):
    """Each packet is one reply; the lane stays open until its other end is closed."""
    ours, theirs = pair
    lane = Lane(ours)
    for ticket in range(3):
        theirs.send(encode(loaded(ticket)))

    assert ([loaded(0), loaded(1), loaded(2)], True) == lane.receive()
    theirs.close()
    assert ([], False) == lane.receive()


@pytest.mark.parametrize("kind", [Lane, Stream])
def test_nonsense_is_refused(kind):
    """What is no message of ours ends the conversation."""
    ours, theirs = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET if kind is Lane else socket.SOCK_STREAM
    )
    with ours, theirs:
        channel = kind(ours)
        theirs.send(b"\x05\x00\x00\x00nonsense")
        with pytest.raises(InvalidError, match="no message"):
            channel.receive()


def test_a_pool_answers_what_is_queued_before_it_ends(pair):
    """Requests that lie in the lane when the pool is told to finish get their replies."""
    ours, theirs = pair
    lane = Lane(ours)
    for ticket in range(20):
        lane.send(load(ticket))
    clock = SystemClock()
    pool = LanePool(theirs, name="test", threads=3, answer=answer)

    pool.start()
    pool.finish(until_s=clock.monotonic_s() + PATIENCE_S, clock=clock)
    replies, _ = lane.receive()

    assert set(range(20)) == {reply.ticket for reply in replies}


def test_a_pool_answers_a_killed_engine_to_the_end():
    """An engine that was killed with replies unread does not take its queued requests with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answered = []
    with theirs:
        theirs.send(encode(loaded(99)))  # A reply that the engine never reads.
        for ticket in range(5):
            ours.send(encode(load(ticket)))
        ours.close()
        clock = SystemClock()

        def note(request: object) -> Loaded:
            assert isinstance(request, Load)
            answered.append(request.ticket)
            return loaded(request.ticket)

        pool = LanePool(theirs, name="test", threads=1, answer=note)
        pool.start()
        pool.finish(until_s=clock.monotonic_s() + PATIENCE_S, clock=clock)

    assert list(range(5)) == sorted(answered)
