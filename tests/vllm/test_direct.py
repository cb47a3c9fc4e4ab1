"""The direct path on the real engine: device tensors and blobs, and no CPU tier between."""

import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models, stores, test_damage
from tests.vllm.conftest import NewPlace
from tests.vllm.engine import Engine, Generation
from tests.vllm.stores import CHUNKS, FLOAT32, LONG, PROMPT_CHUNKS, PROMPTS, Reference
from tests.vllm.test_damage import CHUNKS_EACH, DAMAGE
from tests.vllm.test_shapes import DO_NOT_STORE, SHAPES, SHARING, Shape

BUFFERS_BYTES = 16 * 2**20
"""Seven chunks on either side of the ring: LONG alone has thirteen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectPlace(stores.Place):
    """One machine's view of a root that its engines reach by the direct path."""

    def transfer(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engine's `kv_transfer_config`: two options, and no CPU tier."""
        return {
            "kv_connector": "PrefixStoreConnector",
            "kv_connector_module_path": "prefixstore.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "root": str(self.root),
                "mode": "direct",
                "buffers_bytes": BUFFERS_BYTES,
                **options,
            },
        }


@pytest.fixture
def new_direct(new_place: NewPlace) -> Any:
    """Give a function that makes machines on one root."""

    def make(**options: Any) -> DirectPlace:
        place = new_place(**options)
        return DirectPlace(
            root=place.root, cache=place.cache, start=place.start, options=place.options
        )

    return make


def forget(engine: Engine) -> None:
    """Empty the engine's own cache; the step before it lets go of blocks that were just stored."""
    engine.generate([[5]], max_tokens=2)
    assert engine.reset_prefix_cache()


def test_what_a_killed_engine_stored_serves_the_next_and_another_host(
    new_direct: Any, tiny_llama: Path, alone: Reference
) -> None:
    """Cold as without a store; after SIGKILL and on a second host as from the engine's own cache."""
    here, there = new_direct(), new_direct()
    engine = here.engine(tiny_llama)
    cold = engine.generate_each(PROMPTS, logprobs=1)
    here.await_blobs(CHUNKS)
    engine.kill()
    with here.engine(tiny_llama, state=None) as engine, there.engine(tiny_llama) as other:
        # The very first request comes before the store is open: it waits the moment that takes.
        warm = engine.generate_each(PROMPTS, logprobs=1)
        regions = stores.shared_regions(engine)
        second = other.generate(PROMPTS)
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert stores.logprobs(alone.cold) == stores.logprobs(cold)
    assert list(PROMPT_CHUNKS) == stores.cached_chunks(warm) == stores.cached_chunks(second)
    assert stores.logprobs(alone.own_hit) == stores.logprobs(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm) == stores.outputs(second)
    assert (set(), {}) == (regions, failures), "no CPU tier, no swallowed exception"


def test_damage_and_a_stopped_io_process_cost_only_a_recompute(
    new_direct: Any, tiny_llama: Path
) -> None:
    """Every tenth blob damaged, then the I/O process asleep in mid-load: each time the same answers."""
    place = new_direct(load_deadline_s=1.0, find_deadline_s=1.0)
    chains: list[list[Path]] = []
    known: set[str] = set()
    cold = []
    with place.engine(tiny_llama) as engine:
        for number, prompt in enumerate(test_damage.PROMPTS, start=1):
            cold += engine.generate([prompt])
            blobs = place.await_blobs(number * CHUNKS_EACH)
            new = [blobs[key] for key in blobs.keys() - known]
            chains.append(sorted(new, key=lambda blob: stores.header_of(blob).end_token))
            known |= blobs.keys()
    for (damage, position, _), chain in zip(DAMAGE, chains, strict=True):
        damage(chain[position], chain[position - 1])

    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(test_damage.PROMPTS)
        stores.until(lambda: len(place.blobs()) == 50, "all chunks to be published again")
        reasons = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        forget(engine)
        healed = engine.generate_each(test_damage.PROMPTS)
        forget(engine)
        io_process = stores.await_io_process(engine)
        os.kill(io_process, signal.SIGSTOP)
        try:
            asleep = engine.generate_each(test_damage.PROMPTS[:2])
        finally:
            with contextlib.suppress(ProcessLookupError):  # Replaced already, for hanging.
                os.kill(io_process, signal.SIGCONT)
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert stores.outputs(cold) == stores.outputs(warm) == stores.outputs(healed)
    assert stores.outputs(cold)[:2] == stores.outputs(asleep)
    assert {reason: 1 for _, _, reason in DAMAGE} == reasons
    assert 4 == len(place.quarantined()), "all but the deleted one"
    assert [CHUNKS_EACH] * len(test_damage.PROMPTS) == stores.cached_chunks(healed)
    assert {} == failures


def test_killed_while_storing(new_direct: Any, tiny_llama: Path, alone: Reference) -> None:
    """Engine and I/O process killed between two blobs leave whole prefixes to the next engine."""
    place = new_direct()
    engine = place.engine(tiny_llama)
    io_process = stores.await_io_process(engine)
    engine.begin(PROMPTS, max_tokens=200)
    stores.until(lambda: len(place.blobs()) > 0, "a first blob")
    stores.kill(io_process)
    engine.kill()
    left = len(place.blobs())

    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)

    assert 0 < left
    assert stores.outputs(alone.cold) == stores.outputs(warm)


WINDOWED = [shape for shape in SHAPES if shape.model in ("mistral", "gemma3", "gpt-oss")]


@pytest.mark.parametrize("shape", WINDOWED, ids=lambda shape: shape.model)
def test_windows_answer_the_same_and_a_lost_one_costs_a_recompute(
    new_direct: Any, shape: Shape
) -> None:
    """As by the tier: the same chunks, hits up to a boundary; then a window's chunk is removed."""
    place, model = new_direct(buffers_bytes=32 * 2**20), models.tiny(shape.model)
    llm = {"dtype": shape.dtype}
    with place.engine(model, llm=llm) as engine:
        (sharing,) = engine.generate([SHARING], logprobs=1, sampling=DO_NOT_STORE)
        forget(engine)
        (cold,) = engine.generate([LONG], logprobs=1)
        blobs = place.await_blobs(sum(shape.stored))
    with place.engine(model, llm=llm) as engine:
        answers = engine.generate_each([SHARING, LONG], logprobs=1)
        misses = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        forget(engine)
        headers = {blob: stores.header_of(blob) for blob in blobs.values()}
        windows = [b for b in blobs.values() if b.stem[-8:] == min(k[-8:] for k in blobs)]
        last = max(windows, key=lambda blob: headers[blob].end_token)
        last.unlink()
        lame = engine.generate_each([LONG], logprobs=1)
        stores.until(last.is_file, "the chunk to be stored again")
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert shape.stored == stores.chunks_by_group(blobs.values())
    assert [shape.shared_tokens, 13 * stores.BLOCK_TOKENS] == [a.cached_tokens for a in answers]
    assert stores.outputs([sharing, cold]) == stores.outputs(answers)
    assert stores.outputs([cold]) == stores.outputs(lame)
    assert ({}, {}) == (misses, failures)


def test_two_ranks_each_store_their_part(new_direct: Any, tiny_llama: Path) -> None:
    """A hit needs both ranks' parts; where one rank lacks one, both compute, and it is stored again."""
    # Two workers that spin on two cores leave little to what they wait for.
    place = new_direct(find_deadline_s=20, load_deadline_s=60)
    llm = {**FLOAT32, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

    def parts() -> list[list[Path]]:
        namespaces = sorted(place.root.glob("ns/*"))
        return [sorted(namespace.glob("*/*/*.kv")) for namespace in namespaces]

    def await_parts() -> None:
        stores.until(lambda: [CHUNKS] * 2 == [len(part) for part in parts()], "all parts")

    with place.engine(tiny_llama, multiprocess=True, llm=llm, env=env) as engine:
        cold = engine.generate_each(PROMPTS)
        await_parts()
        warm: list[Generation] = []

        def all_hit() -> bool:
            # On two cores that spin a question may come too late, which is a miss.
            forget(engine)
            warm[:] = engine.generate_each(PROMPTS, logprobs=1)
            return list(PROMPT_CHUNKS) == stores.cached_chunks(warm)

        stores.until(all_hit, "hits of both ranks' parts", patience_s=90)
        own_hit = engine.generate_each(PROMPTS, logprobs=1)
        for blob in parts()[0]:
            if stores.header_of(blob).end_token == 4 * stores.BLOCK_TOKENS:
                blob.unlink()
        forget(engine)
        lame = engine.generate_each(PROMPTS)
        misses = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")
        await_parts()

    assert stores.logprobs(own_hit) == stores.logprobs(warm)
    assert stores.outputs(cold) == stores.outputs(warm) == stores.outputs(lame)
    assert set(misses) <= {"absent"}
    assert failures == {}
