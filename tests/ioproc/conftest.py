"""A real I/O process on a real root, for tests of its two sides."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from prefixstore.clock import Clock, SystemClock
from prefixstore.config import StoreConfig
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import ChunkLoad, ChunkStore, Completion, Limits, StoreTarget
from prefixstore.keys import Key

PAYLOAD_BYTES = 40_000
FIELDS = {"model": "test"}
PATIENCE_S = 20.0

MakeClient = Callable[..., IoClient]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the path of a root that is not there yet."""
    return tmp_path / "root"


@pytest.fixture
def make_client(root: Path, tmp_path: Path) -> Iterator[MakeClient]:
    """Give a function that starts a client of the test's root; all are closed at the end."""
    clients: list[IoClient] = []

    def make(*, clock: Clock | None = None, **limits: float) -> IoClient:
        client = IoClient(
            StoreTarget(
                root=str(root),
                namespace=msgspec.json.encode(FIELDS),
                options=msgspec.json.encode(
                    StoreConfig(index_dir=str(tmp_path / "index"), miss_ttl_s=0.0)
                ),
            ),
            Limits(**{"buffer_count": 6, "buffer_bytes": PAYLOAD_BYTES, **limits}),
            clock=clock,
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close(2.0)


@pytest.fixture
def client(make_client: MakeClient) -> IoClient:
    """Give a client whose store is open."""
    client = make_client()
    await_state(client, "on")
    return client


def await_state(client: IoClient, state: str) -> None:
    """Wait until the store is in ``state``."""
    wait_until(lambda: client.state == state, f"state {state}, not {client.state}: {client.reason}")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until ``condition`` holds; fail with ``what`` when it takes too long."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.005)


def await_jobs(client: IoClient) -> list[Completion]:
    """Poll, as a scheduler does, until no job is outstanding."""
    completions: list[Completion] = []
    end_s = time.monotonic() + PATIENCE_S
    while client.busy:
        completions += client.poll()
        assert time.monotonic() < end_s, f"jobs are outstanding after {PATIENCE_S} s"
        time.sleep(0.002)
    return completions


def chain(count: int, salt: int = 0) -> list[Key]:
    """Return the keys of a prefix."""
    return [Key(bytes([salt]) + i.to_bytes(31, "big") + bytes(4)) for i in range(count)]


class ShiftedClock(SystemClock):
    """The machine's clock, with time that a test has made pass: deadlines without waiting for them."""

    def __init__(self) -> None:
        self._passed_s = 0.0

    def monotonic_s(self) -> float:
        """Return the machine's time and what was added."""
        return super().monotonic_s() + self._passed_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds


class Slots:
    """Stands in for the CPU tier: named pieces of memory that jobs read from and write into."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}

    def put(self, slot: int, content: bytes) -> None:
        """Fill a slot."""
        self.memory[slot] = bytearray(content)

    def load(self, key: Key, slot: int) -> ChunkLoad:
        """Describe a load into a slot."""

        def land(payload: memoryview) -> None:
            self.memory[slot][:] = payload

        return ChunkLoad(key=key, raw_bytes=len(self.memory[slot]), land=land)

    def store(self, key: Key, slot: int, *, parent: Key | None = None, end: int = 16) -> ChunkStore:
        """Describe a store from a slot."""

        def fill(payload: memoryview) -> None:
            payload[:] = self.memory[slot]

        return ChunkStore(
            key=key,
            parent=parent,
            end_token=end,
            element_bytes=2,
            raw_bytes=len(self.memory[slot]),
            fill=fill,
        )


def payload(seed: int) -> bytes:
    """Return bytes that are one chunk's own."""
    return bytes((seed * 31 + i * 7) & 0xFF for i in range(PAYLOAD_BYTES))


def store_chain(client: IoClient, keys: list[Key]) -> None:
    """Publish a chain whose chunk ``i`` holds ``payload(i)``."""
    slots = Slots()
    chunks = []
    for i, key in enumerate(keys):
        slots.put(i, payload(i))
        parent = keys[i - 1] if i else None
        chunks.append(slots.store(key, i, parent=parent, end=16 * (i + 1)))
    assert client.store(1000, chunks)
    await_jobs(client)
