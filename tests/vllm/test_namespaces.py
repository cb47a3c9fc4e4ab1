"""What decides KV besides tokens, on the real engine: each change of it must miss.

With an identity made of the model's name and a few sizes every case here hits and answers wrong, in
silence; vLLM's own file tier is shown to. The root holds the prompts' chunks of the tiny Llama, and what
is asked of it is nearly that engine. All other changes are tried on configs alone (test_fingerprint.py).
"""

import shutil
import time
from pathlib import Path

import pytest

from tests.vllm import models, stores
from tests.vllm.conftest import StartWithFiles
from tests.vllm.stores import FLOAT32, LONG, PROMPT_CHUNKS, PROMPTS, Place, Reference

STRETCHED = {
    **FLOAT32,
    "hf_overrides": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
}


def count_blobs(place: Place) -> int:
    """Count blobs of all namespaces: keys of the same tokens are the same in each."""
    return len(list(place.root.glob("ns/*/*/*/*.kv")))


def replace_weights(model: Path) -> None:
    """Put other weights under a model's path."""
    shutil.copy(models.tiny("llama", seed=1) / "model.safetensors", model / "model.safetensors")
    time.sleep(
        0.05
    )  # What changes in the very tick in which an engine begins, it does not believe.


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """Give a copy of the tiny Llama that a test may change."""
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    time.sleep(0.05)
    return copy


def test_other_rope_and_other_weights_miss_where_vllms_own_tier_answers_wrong(
    filled: Place, model: Path, start_with_files: StartWithFiles
) -> None:
    """Under one path, RoPE is stretched by an option, then the weights are replaced."""
    with start_with_files(model) as engine:
        engine.generate([LONG])
        start_with_files.await_files(13)
    with start_with_files(model, STRETCHED) as engine:
        (stretched_wrong,) = engine.generate([LONG])
    with filled.engine(model, llm=STRETCHED) as engine:
        (stretched,) = engine.generate([LONG])
    replace_weights(model)
    with start_with_files(model) as engine:
        (replaced_wrong,) = engine.generate([LONG])
    with filled.engine(model) as engine:
        (replaced,) = engine.generate([LONG])

    assert [0, 0] == stores.cached_chunks([stretched, replaced])
    assert [13, 13] == stores.cached_chunks([stretched_wrong, replaced_wrong])
    assert stretched.token_ids != stretched_wrong.token_ids
    assert replaced.token_ids != replaced_wrong.token_ids


def test_harmless_changes_keep_their_hits(filled: Place, model: Path, alone: Reference) -> None:
    """All at once: another path, a renamed model, other limits, batches and memory."""
    llm = {
        **FLOAT32,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 3,
        "served_model_name": "renamed",
        "seed": 7,
    }
    options = {"weights": "full", "cpu_bytes_to_use": stores.CPU_BYTES // 2}
    env = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    with filled.engine(model, llm=llm, options=options, env=env) as engine:
        answers = engine.generate_each(PROMPTS)

    assert list(PROMPT_CHUNKS) == stores.cached_chunks(answers)
    assert stores.outputs(alone.cold) == stores.outputs(answers)
    assert 1 == len(list(filled.root.glob("ns/*/manifest.json")))


def test_a_context_length_that_changes_rope_is_another_model(place: Place) -> None:
    """With two sets of RoPE factors, `max_model_len` chooses: the same tokens, other KV."""
    model = models.tiny("phi3")
    prompt = LONG[:700]
    with place.engine(model, llm={**FLOAT32, "max_model_len": 2048}) as engine:
        (short,) = engine.generate([prompt])
        place.await_blobs(5)
    with place.engine(model, llm={**FLOAT32, "max_model_len": 4096}) as engine:
        (long,) = engine.generate([prompt])

    assert [0, 0] == stores.cached_chunks([short, long])
    assert short.token_ids != long.token_ids


def test_two_workers_share_no_chunks_with_one_where_vllms_own_tier_answers_wrong(
    filled: Place, tiny_llama: Path, alone: Reference, start_with_files: StartWithFiles
) -> None:
    """Tensor parallel workers cut a chunk otherwise, under the same hashes and in chunks of one size."""
    llm = {**FLOAT32, "tensor_parallel_size": 2}
    workers = {"env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, "multiprocess": True}
    with start_with_files(tiny_llama) as engine:
        engine.generate([LONG])
        start_with_files.await_files(13)
    with start_with_files(tiny_llama, llm, **workers) as engine:
        (wrong,) = engine.generate([LONG])
    with filled.engine(tiny_llama, llm=llm, **workers) as engine:
        cold = engine.generate_each(PROMPTS)
        stores.until(lambda: count_blobs(filled) == 2 * stores.CHUNKS, "chunks of their own")

    assert [0, 7, 0] == stores.cached_chunks(cold)
    assert alone.cold[0].token_ids[:4] == cold[0].token_ids[:4], "the same model, cut in two"
    assert [13] == stores.cached_chunks([wrong])
    assert cold[0].token_ids[:4] != wrong.token_ids[:4]
