"""What the direct path asks of a device: staging memory, batched copies, and events to poll.

A **mark** is a point in a device's work. Copies begin after one mark and end at another; nobody waits
for either on the model's thread. ``HostDevice`` is a CPU, where a copy is done when it returns.
``CudaDevice`` is written to CUDA's contract and was **never run on a GPU**; the order of its calls is
covered by a recording stand-in for ``torch.cuda``.
"""

import ctypes
import mmap
from typing import TYPE_CHECKING, Any, Protocol

from prefixstore.vllm.direct.pages import Copies

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CudaDevice", "Device", "HostDevice", "Mark", "Staging"]

Mark = Any
"""A point in a device's work: opaque to all but the device."""


class Staging:
    """Memory that a device copies from and to; lives as long as its ``owner`` is held.

    Attributes:
        address: Where it begins; page-aligned.
        length: Its size in bytes.
    """

    def __init__(self, *, address: int, length: int, owner: object) -> None:
        self.address = address
        self.length = length
        self._owner = owner


class Device(Protocol):
    """The device of one worker. Copies may be submitted from any thread; none of this blocks."""

    def allocate(self, length: int) -> Staging:
        """Take staging memory, pinned where the platform has it."""
        ...

    def now(self) -> Mark:
        """Mark what the model's thread has submitted so far. For that thread only."""
        ...

    def load(self, copies: Copies, *, after: Mark) -> Mark:
        """Copy from staging memory to the device once ``after`` is past; mark the end."""
        ...

    def store(self, copies: Copies, *, after: Mark) -> Mark:
        """Copy from the device to staging memory once ``after`` is past; mark the end."""
        ...

    def is_past(self, mark: Mark) -> bool:
        """Whether the device's work has come past a mark."""
        ...

    def hold_model(self, mark: Mark) -> None:
        """Let what the model's thread submits from now on begin after ``mark``, on the device."""
        ...

    def finish(self) -> None:
        """Wait for all copies. They take milliseconds and no I/O; only for the way out of a bug."""
        ...


class HostDevice:
    """A CPU platform: the KV cache is host memory, and a copy is done when it returns."""

    def allocate(self, length: int) -> Staging:
        """Take page-aligned memory; its pages are taken when they are first used."""
        memory = mmap.mmap(-1, length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return Staging(address=address, length=length, owner=memory)

    def now(self) -> Mark:
        """Return no mark: the model has computed what it was asked for."""
        return None

    def load(self, copies: Copies, *, after: Mark) -> Mark:
        """Copy to the KV cache; the GIL is free while it does."""
        del after
        _copy(copies.device, copies.staging, copies.lengths)

    def store(self, copies: Copies, *, after: Mark) -> Mark:
        """Copy from the KV cache."""
        del after
        _copy(copies.staging, copies.device, copies.lengths)

    def is_past(self, mark: Mark) -> bool:
        """Return True: nothing is under way."""
        del mark
        return True

    def hold_model(self, mark: Mark) -> None:
        """Do nothing: nothing is under way."""

    def finish(self) -> None:
        """Do nothing: nothing is under way."""


def _copy(targets: Any, sources: Any, lengths: Any) -> None:
    for target, source, length in zip(
        targets.tolist(), sources.tolist(), lengths.tolist(), strict=True
    ):
        ctypes.memmove(target, source, length)


class CudaDevice:
    """A CUDA device: two copy streams of our own, and events on them.

    - A store begins after an event on the model's stream, so it sees what the step computed.
    - A load begins after an event on the model's stream too, so it overwrites nothing that work
      submitted earlier still reads or clears.
    - Nobody waits for a load on the device: its request is scheduled only once the host has seen its
      event past.

    Args:
        torch: The ``torch`` module.
        index: The device's number.
        copy_batch: vLLM's ``swap_blocks_batch(sources, targets, lengths)``: submits to the current
            stream.
    """

    def __init__(
        self, torch: Any, *, index: int, copy_batch: "Callable[[Any, Any, Any], None]"
    ) -> None:
        self._torch = torch
        self._cuda = torch.cuda
        self._index = index
        self._copy_batch = copy_batch
        self._load_stream = self._cuda.Stream(device=index)
        self._store_stream = self._cuda.Stream(device=index)

    def allocate(self, length: int) -> Staging:
        """Take pinned memory."""
        memory = self._torch.empty(length, dtype=self._torch.uint8, pin_memory=True)
        return Staging(address=memory.data_ptr(), length=length, owner=memory)

    def now(self) -> Mark:
        """Record an event on the stream that the model uses."""
        return self._mark(self._cuda.current_stream(self._index), held=None)

    def load(self, copies: Copies, *, after: Mark) -> Mark:
        """Submit one batch to the stream of loads."""
        return self._submit(
            self._load_stream, copies.staging, copies.device, copies.lengths, after=after
        )

    def store(self, copies: Copies, *, after: Mark) -> Mark:
        """Submit one batch to the stream of stores."""
        return self._submit(
            self._store_stream, copies.device, copies.staging, copies.lengths, after=after
        )

    def is_past(self, mark: Mark) -> bool:
        """Ask the event."""
        return bool(mark[0].query())

    def hold_model(self, mark: Mark) -> None:
        """Let the model's stream wait for the event; the host goes on."""
        self._cuda.current_stream(self._index).wait_event(mark[0])

    def finish(self) -> None:
        """Wait for both copy streams."""
        self._load_stream.synchronize()
        self._store_stream.synchronize()

    def _submit(
        self, stream: Any, sources: Any, targets: Any, lengths: Any, *, after: Mark
    ) -> Mark:
        arrays = [
            self._torch.tensor(array.tolist(), dtype=self._torch.int64)
            for array in (sources, targets, lengths)
        ]
        stream.wait_event(after[0])
        # The current stream belongs to a thread, and loads are submitted from the pump's.
        with self._cuda.stream(stream):
            self._copy_batch(*arrays)
        return self._mark(stream, held=arrays)

    def _mark(self, stream: Any, *, held: object) -> Mark:
        event = self._cuda.Event()
        event.record(stream)
        return (event, held)  # What was submitted may be read until the event is past.
