"""A CPU tier that is too small for what waits: requests finish, and what fits is loaded."""

from pathlib import Path

import pytest

from tests.vllm import stores
from tests.vllm.stores import (
    BLOCK_TOKENS,
    FLOAT32,
    LONG,
    PROMPTS,
    TINY_CHUNK_BYTES,
    Place,
    Reference,
)

EIGHT_CHUNKS = 8 * TINY_CHUNK_BYTES


@pytest.mark.parametrize("step_tokens", [4096, 512])
def test_a_prompt_larger_than_the_cpu_tier_finishes_cold(
    place: Place, tiny_llama: Path, alone: Reference, step_tokens: int
) -> None:
    """13 chunks through 8 slots, in one step or in steps that fit: computed, stored as far as may be."""
    with place.engine(
        tiny_llama,
        options={"cpu_bytes_to_use": EIGHT_CHUNKS},
        llm={**FLOAT32, "max_num_batched_tokens": step_tokens, "max_num_seqs": 8},
    ) as engine:
        (answer,) = engine.generate([LONG])
        (again,) = engine.generate([LONG])

    assert alone.cold[0].token_ids == answer.token_ids == again.token_ids


def test_a_prompt_larger_than_the_cpu_tier_finishes_warm(
    filled: Place, tiny_llama: Path, alone: Reference
) -> None:
    """13 stored chunks and 8 slots: what fits is loaded, the rest computed, the answer the same."""
    with filled.engine(tiny_llama, options={"cpu_bytes_to_use": EIGHT_CHUNKS}) as engine:
        (warm,) = engine.generate([LONG])
        declined = stores.labelled(engine, "vllm:prefixstore_declined_hits", "reason")
        # Turned out of the engine's memory and of the CPU tier, loaded once more.
        assert engine.reset_prefix_cache()
        (again,) = engine.generate([LONG])

    assert [8] == stores.cached_chunks([warm])
    assert {"no_room": 5} == declined
    # What comes in may turn out some of what was there; the beginning stays, and it ends.
    (hits,) = stores.cached_chunks([again])
    assert 0 < hits <= 8
    assert alone.cold[0].token_ids == warm.token_ids == again.token_ids


def test_a_cpu_tier_of_one_chunk_still_serves(
    filled: Place, tiny_llama: Path, alone: Reference
) -> None:
    """The least that a CPU tier can be gives the least that can be loaded, and every answer."""
    with filled.engine(tiny_llama, options={"cpu_bytes_to_use": TINY_CHUNK_BYTES}) as engine:
        warm = engine.generate(PROMPTS)

    assert stores.outputs(alone.cold) == stores.outputs(warm)


def test_fifty_waiting_prompts_finish_through_a_small_cpu_tier(
    place: Place, tiny_llama: Path
) -> None:
    """Prompts that wait together, half of them with a common beginning, take turns and all finish."""
    shared = stores.tokens(200, 2 * BLOCK_TOKENS)
    prompts = [
        (*(shared if number % 2 else ()), *stores.tokens(201 + number, 2 * BLOCK_TOKENS + 10))
        for number in range(50)
    ]
    with place.engine(tiny_llama) as engine:
        cold = engine.generate(prompts, max_tokens=4)
        place.await_blobs(2 + 50 * 2)

    with place.engine(tiny_llama, options={"cpu_bytes_to_use": 12 * TINY_CHUNK_BYTES}) as engine:
        warm = engine.generate(prompts, max_tokens=4)
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert stores.outputs(cold) == stores.outputs(warm)
    assert {} == failures
    cached = stores.cached_chunks(warm)
    assert sum(cached) > 0.8 * sum(4 if number % 2 else 2 for number in range(50)), cached
