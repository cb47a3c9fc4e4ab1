"""Law 1 on the real engine: what comes from the store is what the engine would have computed.

Two references: an engine without any store that computes, and the same engine's own prefix hit at the
same cached length. Against the second even the logprobs are equal, bit for bit.
"""

from pathlib import Path

from tests.vllm import stores
from tests.vllm.conftest import NewPlace
from tests.vllm.stores import CHUNKS, PROMPT_CHUNKS, PROMPTS, Place, Reference


def test_cold_engine_with_a_store_answers_as_one_without(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """Storing changes nothing: computed or from the engine's own memory, token for token."""
    with place.engine(tiny_llama) as engine:
        cold = engine.generate_each(PROMPTS, logprobs=1)
        own_hit = engine.generate_each(PROMPTS, logprobs=1)

    assert [0, 7, 0] == stores.cached_chunks(alone.cold) == stores.cached_chunks(cold)
    assert stores.outputs(alone.cold) == stores.outputs(cold)
    assert stores.logprobs(alone.cold) == stores.logprobs(cold)
    assert stores.logprobs(alone.own_hit) == stores.logprobs(own_hit)
    assert all(len(set(answer.token_ids)) > 4 for answer in cold), "a model that repeats itself"


def test_after_sigkill_everything_comes_from_the_store(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """An engine killed with all its processes leaves its chunks to the next one."""
    engine = place.engine(tiny_llama, multiprocess=True)
    cold = engine.generate_each(PROMPTS, logprobs=1)
    place.await_blobs(CHUNKS)
    engine.kill()

    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS, logprobs=1)

    assert list(PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(cold) == stores.outputs(warm)
    assert stores.logprobs(alone.own_hit) == stores.logprobs(warm)


def test_two_replicas_serve_each_other(
    new_place: NewPlace, tiny_llama: Path, alone: Reference
) -> None:
    """Engines that run at the same time on one root each load what the other stored."""
    one, other = new_place(miss_ttl_s=0.1), new_place(miss_ttl_s=0.1)
    with one.engine(tiny_llama) as left, other.engine(tiny_llama) as right:
        left.generate_each(PROMPTS[:1])
        one.await_blobs(13)
        right.generate_each(PROMPTS[2:])
        one.await_blobs(16)
        from_left = right.generate_each(PROMPTS[:1], logprobs=1)
        from_right = left.generate_each(PROMPTS[2:], logprobs=1)

    assert [13] == stores.cached_chunks(from_left)
    assert [3] == stores.cached_chunks(from_right)
    assert stores.logprobs(alone.own_hit[:1]) == stores.logprobs(from_left)
    assert stores.logprobs(alone.own_hit[2:]) == stores.logprobs(from_right)


def test_warm_requests_may_wait_together(filled: Place, tiny_llama: Path, alone: Reference) -> None:
    """Prompts that arrive at once and share chunks are all served from the store."""
    with filled.engine(tiny_llama) as engine:
        warm = engine.generate(PROMPTS)

    assert list(PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm)
