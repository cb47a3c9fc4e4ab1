"""The direct path's addresses, ring, and order of calls on a CUDA device, without an engine."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from prefixstore.errors import InvalidError
from prefixstore.vllm.direct.device import CudaDevice, HostDevice
from prefixstore.vllm.direct.pages import Pages, Region, find_regions, join_copies
from prefixstore.vllm.direct.ring import StagingRing

torch = pytest.importorskip("torch")

LAYERS = ["a", "b"]


def caches(blocks: int = 6) -> dict[str, Any]:
    """Make two layers of (blocks, heads, tokens, content), each byte telling where it is."""
    total = blocks * 2 * 4 * 8
    return {
        name: (torch.arange(total) % 251 + number).to(torch.uint8).reshape(blocks, 2, 4, 8)
        for number, name in enumerate(LAYERS)
    }


def test_a_chunk_goes_out_and_comes_back_into_other_blocks():
    """A payload holds the layers in order, in each the blocks in order, and nothing else moves."""
    kv = caches()
    before = {name: cache.clone() for name, cache in kv.items()}
    pages = Pages(find_regions(kv, LAYERS, blocks=6), blocks_per_chunk=2)
    device = HostDevice()
    ring = StagingRing(device.allocate(3 * 4096), payload_bytes=pages.payload_bytes)
    lease = ring.acquire()
    assert lease is not None
    device.store(pages.copies(lease.address, [4, 1]), after=None)
    payload = ctypes.string_at(lease.address, pages.payload_bytes)
    device.load(pages.copies(lease.address, [0, 5]), after=None)

    expected = b"".join(bytes(before[n][b].flatten().tolist()) for n in LAYERS for b in (4, 1))
    assert expected == payload
    for name in LAYERS:
        assert torch.equal(before[name][[4, 1, 2, 3, 4, 1]], kv[name][[0, 5, 2, 3, 4, 1]])


def test_blocks_that_the_engine_has_itself_are_left_alone():
    """A chunk entered in its middle writes only the blocks from there on."""
    kv = caches()
    before = {name: cache.clone() for name, cache in kv.items()}
    pages = Pages(find_regions(kv, LAYERS, blocks=6), blocks_per_chunk=3)
    device = HostDevice()
    memory = device.allocate(4096)
    device.store(pages.copies(memory.address, [1, 2, 3]), after=None)
    device.load(pages.copies(memory.address, [5], first=2), after=None)

    for name in LAYERS:
        assert torch.equal(before[name][[0, 1, 2, 3, 4, 3]], kv[name])


def test_kernel_blocks_make_one_page():
    """A cache that counts smaller blocks than the engine has one page of several of them."""
    kv = caches(blocks=6)
    (region, _) = find_regions(kv, LAYERS, blocks=3)

    assert (128, 128, 3) == (region.page_bytes, region.stride_bytes, region.blocks)


@pytest.mark.parametrize(
    "cache",
    [torch.zeros(2, 6, 4, 8).transpose(0, 1), torch.zeros(6, 4, 16)[:, :, :8], torch.zeros(5, 4)],
    ids=["keys and values apart", "padding between tokens", "another number of blocks"],
)
def test_a_block_in_pieces_is_refused(cache: Any):
    """A block that is not one run of bytes would carry bytes of others: refused, tier mode named."""
    with pytest.raises(InvalidError, match="use mode=tier"):
        find_regions({"a": cache}, ["a"], blocks=6)


def test_no_address_outside_the_cache():
    """A block id past the cache is a bug that must not reach memory."""
    pages = Pages([Region(address=0, stride_bytes=8, page_bytes=8, blocks=4)], blocks_per_chunk=1)
    with pytest.raises(AssertionError):
        pages.copies(0, [4])


def test_the_ring_lends_no_more_than_it_has():
    """Buffers are lent once, kept back for loads, and come back once however often they are returned."""
    ring = StagingRing(HostDevice().allocate(3 * 4096), payload_bytes=4000)
    first, second = ring.acquire(leave=1), ring.acquire(leave=1)
    assert first is not None
    assert second is not None
    assert ring.acquire(leave=1) is None
    third = ring.acquire()
    assert third is not None
    assert ring.acquire() is None
    first.release()
    first.release()

    assert [True, False] == [ring.acquire() is not None for _ in range(2)]
    assert 4096 == abs(second.address - third.address)


class RecordedCuda:
    """Stands in for ``torch.cuda``: notes each call; an event is past when told so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.current = SimpleNamespace(name="model")
        self.current.wait_event = lambda event: self.calls.append(("model waits", event.number))
        self.events: list[Any] = []

    def Stream(self, *, device: int) -> Any:  # noqa: N802 - CUDA's name
        name = ("loads", "stores")[len([c for c in self.calls if c[0] == "stream"])]
        self.calls.append(("stream", name, device))
        return SimpleNamespace(
            name=name,
            wait_event=lambda event: self.calls.append((f"{name} waits", event.number)),
            synchronize=lambda: self.calls.append((f"{name} synchronize",)),
        )

    def Event(self) -> Any:  # noqa: N802 - CUDA's name
        event = SimpleNamespace(number=len(self.events), past=False)
        event.record = lambda stream: self.calls.append(("record", event.number, stream.name))
        event.query = lambda: event.past
        self.events.append(event)
        return event

    def current_stream(self, _device: int) -> Any:
        return self.current

    def stream(self, stream: Any) -> Any:
        cuda = self

        class Entered:
            def __enter__(self) -> None:
                cuda.current = stream

            def __exit__(self, *_: object) -> None:
                cuda.current = SimpleNamespace(name="model")

        return Entered()


def test_streams_and_events_on_cuda():
    """Copies wait for the model's event on a stream of their own; the host never waits, it asks."""
    cuda = RecordedCuda()
    model = cuda.current
    module = SimpleNamespace(cuda=cuda, tensor=torch.tensor, int64=torch.int64)

    def copy_batch(sources: Any, targets: Any, lengths: Any) -> None:
        cuda.calls.append(
            ("copy", cuda.current.name, sources.tolist(), targets.tolist(), lengths.tolist())
        )

    device = CudaDevice(module, index=1, copy_batch=copy_batch)
    pages = Pages(
        [Region(address=1000, stride_bytes=16, page_bytes=8, blocks=4)], blocks_per_chunk=1
    )
    stored = device.store(
        join_copies([pages.copies(50, [2]), pages.copies(70, [3])]), after=device.now()
    )
    loaded = device.load(pages.copies(50, [1]), after=device.now())
    cuda.current = model
    device.hold_model(stored)
    was_past = device.is_past(loaded)
    cuda.events[3].past = True

    assert [
        ("stream", "loads", 1),
        ("stream", "stores", 1),
        ("record", 0, "model"),
        ("stores waits", 0),
        ("copy", "stores", [1032, 1048], [50, 70], [8, 8]),
        ("record", 1, "stores"),
        ("record", 2, "model"),
        ("loads waits", 2),
        ("copy", "loads", [50], [1016], [8]),
        ("record", 3, "loads"),
        ("model waits", 1),
    ] == cuda.calls
    assert (False, True) == (was_past, device.is_past(loaded))
