"""Other shapes than one block of full attention: several KV groups, windows, larger chunks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models, stores
from tests.vllm.stores import LONG, PROMPTS, Place, Reference


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt-oss"])
def test_windowed_and_mixed_models_answer_the_same_from_the_store(place: Place, name: str) -> None:
    """Each KV group of a model with sliding windows is stored and loaded as its own chunks."""
    model = models.tiny(name)
    llm = {"dtype": models.fast_dtype()}
    with place.engine(model, llm=llm) as engine:
        (cold,) = engine.generate([LONG], logprobs=1)
        groups = {blob.stem[-8:] for blob in _settled(place)}
    with place.engine(model, llm=llm) as engine:
        (warm,) = engine.generate([LONG], logprobs=1)

    assert len(groups) == {"mistral": 1, "gemma3": 4, "gpt-oss": 2}[name]
    assert 0 == cold.cached_tokens
    assert 13 * stores.BLOCK_TOKENS == warm.cached_tokens
    assert cold.token_ids == warm.token_ids


def _settled(place: Place) -> list[Path]:
    """Return the blobs once their number no longer grows."""
    seen = -1

    def is_settled() -> bool:
        nonlocal seen
        before, seen = seen, len(place.blobs())
        return seen == before > 0

    stores.until(is_settled, "the stores to end")
    return list(place.blobs().values())


@pytest.mark.parametrize(
    "cut",
    [
        ({"blocks_per_chunk": 2}, {}, 256),
        ({"blocks_per_chunk": 4}, {"block_size": 32}, 128),
    ],
)
def test_chunks_of_several_blocks_answer_the_same_from_the_store(
    place: Place,
    tiny_llama: Path,
    alone: Reference,
    cut: tuple[Mapping[str, Any], Mapping[str, Any], int],
) -> None:
    """A chunk may be several blocks, and a prefix may end in the middle of one."""
    options, llm, chunk_tokens = cut
    llm = {**stores.FLOAT32, **llm}
    with place.engine(tiny_llama, options=options, llm=llm) as engine:
        cold = engine.generate_each(PROMPTS)
        _settled(place)
    with place.engine(tiny_llama, options=options, llm=llm) as engine:
        warm = engine.generate_each(PROMPTS)

    assert stores.outputs(alone.cold) == stores.outputs(cold) == stores.outputs(warm)
    expected = [len(prompt) // chunk_tokens * chunk_tokens for prompt in PROMPTS]
    assert expected == [answer.cached_tokens for answer in warm]


def test_another_chunk_size_does_not_share(
    filled: Place, tiny_llama: Path, alone: Reference
) -> None:
    """Engines that cut chunks differently have namespaces of their own."""
    with filled.engine(tiny_llama, options={"blocks_per_chunk": 2}) as engine:
        answers = engine.generate_each(PROMPTS)

    assert 0 == answers[0].cached_tokens
    assert stores.outputs(alone.cold) == stores.outputs(answers)
    assert 2 == len(list(filled.root.glob("ns/*/manifest.json")))


def test_the_bare_tier_serves_under_a_namespace_that_the_user_names(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """Below vLLM's own connector the tier stores and loads whole slots."""
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            # vLLM's own spec, but for the worker: it has none for CPU platforms.
            "spec_name": "PrefixStoreSpec",
            "spec_module_path": "prefixstore.vllm.spec",
            "cpu_bytes_to_use": stores.CPU_BYTES,
            "secondary_tiers": [
                {
                    "type": "PrefixStoreTier",
                    "module_path": "prefixstore.vllm.tier",
                    "root": str(place.root),
                    "namespace": "tiny llama, float32",
                }
            ],
        },
    }
    llm = {**stores.FLOAT32, "kv_transfer_config": transfer}
    env = {"XDG_CACHE_HOME": str(place.cache)}
    with place.start(tiny_llama, llm=llm, env=env) as engine:
        stores.await_state(engine, "on")
        cold = engine.generate_each(PROMPTS)
        place.await_blobs(stores.CHUNKS)
    with place.start(tiny_llama, llm=llm, env=env) as engine:
        stores.await_state(engine, "on")
        warm = engine.generate_each(PROMPTS)

    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(cold) == stores.outputs(warm)
