"""Other shapes than one block of full attention: several KV groups, windows, larger chunks."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models, stores
from tests.vllm.engine import EngineError
from tests.vllm.models import REPO
from tests.vllm.stores import LONG, PROMPTS, Place, Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row of the table in docs/vllm.md.

    Attributes:
        model: The recipe of the tiny model that is run.
        kind: What the model stands for.
        groups: Its KV groups in vLLM.
        shared_tokens: What a prompt that shares 809 tokens of a stored one need not compute.
        stored: Chunks of each group that a prompt of 1,692 tokens leaves.
        megabytes: What they take in the root.
        ends: Chunks of each group that vLLM would keep by itself.
        dtype: What the engine computes in.
    """

    model: str
    kind: str
    groups: int
    shared_tokens: int
    stored: tuple[int, ...]
    megabytes: float
    ends: tuple[int, ...] | None = None
    dtype: str = "float32"

    def row(self) -> str:
        """Return the row as the docs have it."""
        chunks, ends = (
            " + ".join(map(str, sizes)) for sizes in (self.stored, self.ends or self.stored)
        )
        return (
            f"| {self.kind} | `{self.model}` | {self.groups} | {self.shared_tokens} | {chunks} "
            f"| {self.megabytes:.1f} | {ends} |"
        )


SHAPES = (
    Shape(
        model="llama",
        kind="full attention, grouped queries",
        groups=1,
        shared_tokens=768,
        stored=(13,),
        megabytes=6.9,
    ),
    Shape(
        model="mixtral",
        kind="mixture of experts",
        groups=1,
        shared_tokens=768,
        stored=(13,),
        megabytes=6.9,
    ),
    Shape(
        model="mistral",
        kind="a sliding window on every layer",
        groups=1,
        shared_tokens=768,
        stored=(13,),
        megabytes=6.9,
        ends=(2,),
    ),
    Shape(
        model="gemma3",
        kind="three sliding windows to one full attention",
        groups=4,
        shared_tokens=768,
        stored=(5, 5, 5, 13),
        megabytes=3.8,
        ends=(2, 2, 2, 13),
    ),
    Shape(
        model="gpt-oss",
        kind="window and full attention in turn, sinks, mixture of experts",
        groups=2,
        shared_tokens=768,
        stored=(7, 13),
        megabytes=5.3,
        ends=(1, 13),
    ),
    Shape(
        model="qwen3-next",
        kind="three linear attentions (states) to one full attention",
        groups=4,
        shared_tokens=768,
        stored=(7, 7, 7, 13),
        dtype="bfloat16",
        megabytes=6.5,
        ends=(1, 1, 1, 13),
    ),
)

SHARING = (*LONG[:809], *stores.tokens(502, 300))
"""Another prompt that begins as LONG does."""
OTHERWISE = (*LONG[:1000], 5, *LONG[1001:])
"""LONG but for one token far back, as far as four layers of windows can see."""
DO_NOT_STORE = {"extra_args": {"kv_transfer_params": {"max_offload_tokens": 0}}}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_each_shape_of_model_answers_the_same_from_the_store(place: Place, shape: Shape) -> None:
    """The same prompt hits whole, and one that only shares its beginning hits up to a boundary."""
    model = models.tiny(shape.model)
    llm = {"dtype": shape.dtype}
    with place.engine(model, llm=llm) as engine:
        (sharing,) = engine.generate([SHARING], logprobs=1, sampling=DO_NOT_STORE)
        assert [] == list(place.blobs())
        engine.reset_prefix_cache()
        (cold,) = engine.generate([LONG], logprobs=1)
        blobs = _settled(place)
        (other,) = engine.generate([OTHERWISE], logprobs=1, sampling=DO_NOT_STORE)
    with place.engine(model, llm=llm) as engine:
        answers = engine.generate_each([SHARING, LONG], logprobs=1)
        assert {} == stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        assert {} == stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    chunks = Counter(blob.stem[-8:] for blob in blobs)
    seen = dataclasses.replace(
        shape,
        groups=len(chunks),
        shared_tokens=answers[0].cached_tokens,
        stored=tuple(sorted(chunks.values())),
        megabytes=sum(blob.stat().st_size for blob in blobs) / 1e6,
    )
    assert shape.row() == seen.row()
    assert [0, 0] == [sharing.cached_tokens, cold.cached_tokens]
    assert 13 * stores.BLOCK_TOKENS == answers[1].cached_tokens
    assert stores.outputs([sharing, cold]) == stores.outputs(answers)
    assert other.logprobs != cold.logprobs, "what is far back must matter, or nothing is shown"
    assert len(set(cold.token_ids)) > 4, "a model that repeats itself"


def test_the_table_of_the_docs_is_what_is_run() -> None:
    """Each row of the docs' table of shapes is a case above, and each case is a row."""
    lines = (REPO / "docs" / "vllm.md").read_text().splitlines()
    start = lines.index(
        "| shape | tiny model | KV groups | shared tokens used | chunks stored | MB | by vLLM alone |"
    )
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])

    assert [shape.row() for shape in SHAPES] == list(rows)


@pytest.mark.parametrize("name", ["gpt-oss", "mistral"])
def test_without_shared_prefixes_vllm_keeps_only_the_end(place: Place, name: str) -> None:
    """With `shared_prefixes` off only the last window is stored, and only the same prompt hits."""
    model = models.tiny(name)
    llm = {"dtype": models.fast_dtype()}
    options = {"shared_prefixes": False}
    with place.engine(model, llm=llm, options=options) as engine:
        engine.generate([LONG])
        blobs = _settled(place)
    with place.engine(model, llm=llm, options=options) as engine:
        answers = engine.generate_each([SHARING, LONG])

    assert {"gpt-oss": 14, "mistral": 2}[name] == len(blobs)
    assert [0, 1664] == [answer.cached_tokens for answer in answers]


HAS_AMX = "amx_tile" in Path("/proc/cpuinfo").read_text()


@pytest.mark.skipif(HAS_AMX, reason="with AMX vLLM's build for CPUs goes on from a prefix")
def test_latent_attention_that_cannot_go_on_from_a_prefix_is_refused(place: Place) -> None:
    """Where vLLM turns prefix caching off for MLA, a loaded prefix would be answered wrongly."""
    with pytest.raises(EngineError, match="go on from a loaded prefix"):
        place.engine(models.tiny("deepseek-v2"))


@pytest.mark.skipif(
    not HAS_AMX, reason="without AMX vLLM's build for CPUs cannot go on from a prefix"
)
def test_latent_attention_answers_as_from_the_engines_own_cache(place: Place) -> None:
    """Prefills of other lengths round otherwise there: what a hit must equal is the engine's own hit."""
    model, llm = models.tiny("deepseek-v2"), {"dtype": "bfloat16"}
    with place.engine(model, llm=llm) as engine:
        engine.generate([LONG])
        assert 13 == len(_settled(place))
        own = engine.generate_each([LONG, SHARING], logprobs=1, sampling=DO_NOT_STORE)
    with place.engine(model, llm=llm) as engine:
        stored = engine.generate_each([LONG, SHARING], logprobs=1)

    assert [1664, 768] == [answer.cached_tokens for answer in own]
    assert [1664, 768] == [answer.cached_tokens for answer in stored]
    assert stores.outputs(own) == stores.outputs(stored)
    assert stores.logprobs(own) == stores.logprobs(stored)


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
