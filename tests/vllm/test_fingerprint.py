"""The namespace from real engine configs: what must differ differs, what need not does not.

No engine runs here: configs are built as vLLM builds them, from its own arguments.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from prefixstore.errors import InvalidError
from prefixstore.keys import namespace_id
from prefixstore.tree.root import diff_fields
from prefixstore.vllm.fingerprint import scheduler_fields
from prefixstore.vllm.weights import WeightDigests
from tests.vllm import models

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")

YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give vLLM what it needs to build a config here, and no seed of the surroundings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def engine_fields(model: Path, *, element: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """Return the scheduler's fields of an engine that these arguments would start."""
    given = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, **arguments}
    config = EngineArgs(model=str(model), **given).create_engine_config()
    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=element)
    caches = KVCacheConfig(
        num_blocks=10,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(layer_names=["a", "b"], kv_cache_spec=spec)],
        hash_block_size=128,
    )
    return scheduler_fields(config, caches, digests=WeightDigests(None))


def test_the_same_engine_has_the_same_namespace(tiny_llama: Path, tmp_path: Path) -> None:
    """What cannot change KV changes no field: the path, names, sizes of batches and of memory."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_llama, copy)
    one = engine_fields(tiny_llama)
    other = engine_fields(
        copy,
        served_model_name="another",
        max_num_batched_tokens=2048,
        max_num_seqs=7,
        seed=3,
        gpu_memory_utilization=0.5,
        disable_log_stats=True,
    )

    assert [] == diff_fields(one, other)
    assert namespace_id(one) == namespace_id(other)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"hf_overrides": {"rope_parameters": YARN}}, "model_config.rope_parameters"),
        ({"max_model_len": 1024}, "max_model_len"),
        ({"prefix_caching_hash_algo": "sha256_cbor"}, "hash.algorithm"),
        ({"load_format": "safetensors"}, "loading.format"),
        ({"code_revision": "other"}, "code.code_revision"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "topology.tensor"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "topology.pipeline"),
    ],
)
def test_what_may_change_kv_changes_the_namespace(
    tiny_llama: Path, arguments: Mapping[str, Any], field: str
) -> None:
    """Each of these gives other bytes for the same tokens, or might."""
    one, other = engine_fields(tiny_llama), engine_fields(tiny_llama, **arguments)

    differences = diff_fields(one, other)
    assert any(line.startswith(field) for line in differences), differences
    assert namespace_id(one) != namespace_id(other)


def test_other_weights_have_another_namespace(tiny_llama: Path) -> None:
    """Weights are told apart by their bytes alone."""
    one, other = engine_fields(tiny_llama), engine_fields(models.tiny("llama", seed=1))

    (line,) = diff_fields(one, other)
    assert line.startswith("weights.files.model.safetensors")


def test_groups_and_their_geometry_are_part_of_the_namespace(tiny_llama: Path) -> None:
    """The same model whose cache is cut or typed otherwise stores other bytes."""
    one = engine_fields(tiny_llama)
    other = engine_fields(tiny_llama, element=torch.bfloat16)

    assert {line.partition(":")[0] for line in diff_fields(one, other)} == {"groups"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prefix_caching_hash_algo": "xxhash"}, "random seed in each process"),
        ({"load_format": "dummy"}, "draws weights at random"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding",
        ),
    ],
)
def test_what_cannot_be_established_is_one_sentence(
    tiny_llama: Path, arguments: Mapping[str, Any], sentence: str
) -> None:
    """Such an engine runs without the store, and its log says what would settle it."""
    with pytest.raises(InvalidError, match=sentence) as raised:
        engine_fields(tiny_llama, **arguments)

    assert "\n" not in str(raised.value)


def test_a_fixed_hash_seed_is_part_of_the_namespace(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PYTHONHASHSEED set everywhere to one value, keys agree; another value is another world."""
    fields = []
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        fields.append(engine_fields(tiny_llama, prefix_caching_hash_algo="xxhash"))

    assert fields[0] == fields[2]
    assert any(line.startswith("hash.seed") for line in diff_fields(fields[0], fields[1]))
