"""SIGKILL at any moment: nothing leaks, nothing published is lost, the next engine is right."""

import os
import signal
from pathlib import Path

from tests.vllm import stores
from tests.vllm.stores import CHUNKS, LONG, PROMPTS, Place, Reference


def test_sigkill_leaves_no_memory_and_no_process(place: Place, tiny_llama: Path) -> None:
    """The CPU tier in /dev/shm goes with the engine, and the I/O process soon after."""
    engine = place.engine(tiny_llama, multiprocess=True)
    engine.generate([LONG])
    io_process = stores.await_io_process(engine)
    regions = stores.shared_regions(engine)
    assert regions, "the engine has a CPU tier"
    engine.kill()

    stores.until(lambda: not stores.is_running(io_process), "the I/O process to leave")
    assert not [path for path in regions if path.exists()]


def test_an_orderly_end_leaves_nothing_either(place: Place, tiny_llama: Path) -> None:
    """A quit engine waits for its stores and takes its I/O process along."""
    engine = place.engine(tiny_llama)
    engine.generate([LONG])
    io_process = stores.await_io_process(engine)
    regions = stores.shared_regions(engine)
    assert 0 == engine.quit()

    assert not stores.is_running(io_process)
    assert 13 == len(place.blobs())
    assert not [path for path in regions if path.exists()]
    assert [] == [path for path in place.root.glob("tmp/**/*") if path.is_file()]


def test_stores_accepted_before_the_kill_are_published(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """An I/O process that slept through the engine's death still publishes what it was given."""
    engine = place.engine(tiny_llama)
    io_process = stores.await_io_process(engine)
    os.kill(io_process, signal.SIGSTOP)
    try:
        cold = engine.generate_each(PROMPTS)
        assert {} == place.blobs()
        engine.kill()
    finally:
        os.kill(io_process, signal.SIGCONT)

    place.await_blobs(CHUNKS)
    stores.until(lambda: not stores.is_running(io_process), "the I/O process to leave")
    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)
    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(cold) == stores.outputs(warm)


def test_sigkill_of_everything_while_storing(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """Engine and I/O process killed between two blobs leave whole prefixes, and temporary files at most."""
    engine = place.engine(tiny_llama)
    io_process = stores.await_io_process(engine)
    engine.begin(PROMPTS, max_tokens=200)
    stores.until(lambda: len(place.blobs()) > 0, "a first blob")
    stores.kill(io_process)
    engine.kill()
    left = len(place.blobs())

    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)
        place.await_blobs(CHUNKS)

    assert 0 < left
    assert stores.outputs(alone.cold) == stores.outputs(warm)
    headers = [stores.header_of(blob) for blob in place.blobs().values()]
    keys = {bytes(header.key) for header in headers}
    assert all(header.parent is None or bytes(header.parent) in keys for header in headers)
