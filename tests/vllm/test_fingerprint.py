"""The namespace from real engine configs: what must differ differs, what need not does not.

No engine runs here: configs are built as vLLM builds them, from its own arguments. The tables below read
like the one in docs/vllm.md, and a test holds the two together.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams, envs
from vllm.config import MultiModalConfig, VllmConfig
from vllm.model_executor import model_loader
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    RSWASpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from prefixstore.errors import InvalidError
from prefixstore.keys import namespace_id
from prefixstore.tree.root import diff_fields
from prefixstore.vllm import fingerprint
from tests.vllm import models
from tests.vllm.fingerprints import Change, edit_config, engine_fields, on_transformers, set_in

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("config_settings")]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}


def edit_one_tensor(model: Path) -> None:
    """Change one element of one tensor; size, names and everything else stay."""
    tensors = load_file(model / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def write_code(model: Path) -> None:
    """Put code into a model's directory."""
    (model / "modeling_own.py").write_text("SCALE = 2\n")


def write_index(model: Path) -> None:
    """Say which of the files hold which weights."""
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def write_merged_adapter(model: Path) -> None:
    """Put an adapter into a model's directory, as those have that add one to their weights."""
    (model / "adapters" / "retrieval").mkdir(parents=True)
    (model / "adapters" / "retrieval" / "adapter_config.json").write_text('{"lora_alpha": 32}')


def write_tokenizer(model: Path) -> None:
    """Put a tokenizer's vocabulary into a model's directory."""
    (model / "vocab.json").write_text("{}")


def plug_in_loader(patch: pytest.MonkeyPatch) -> None:
    """Put a plug-in's class in the place of vLLM's for the usual format."""
    own = type("Own", (DefaultModelLoader,), {"__module__": "plug_in.loader"})
    patch.setitem(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "auto", own)


def quantized(config: VllmConfig) -> None:
    """Make a config one of a model whose weights are quantised."""
    object.__setattr__(config, "quant_config", Fp8Config())


def with_pictures(**fields: Any) -> Callable[[VllmConfig], None]:
    """Return an edit that makes a config one of a multimodal model."""
    return set_in("model_config", multimodal_config=MultiModalConfig(**fields))


def as_rswa(spec: FullAttentionSpec) -> KVCacheSpec:
    """Return the spec of a model whose window slides over generated tokens, as it comes in a group."""
    windowed = RSWASpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
        rswa_window=64,
    )
    return UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs={"a": windowed})


OTHERS = (
    Change(
        name="one tensor of the weights, under the same path",
        differs="weights",
        files=edit_one_tensor,
    ),
    Change(
        name="RoPE scaling in the model's config",
        differs="model_config.rope_parameters",
        files=edit_config(rope_parameters=YARN),
    ),
    Change(
        name="RoPE scaling by `--hf-overrides`",
        differs="model_config.rope_parameters",
        arguments={"hf_overrides": {"rope_parameters": YARN}},
    ),
    Change(
        name="any other `--hf-overrides`",
        differs="model_config.rms_norm_eps",
        arguments={"hf_overrides": {"rms_norm_eps": 1e-3}},
    ),
    Change(
        name="the model's code, with `--trust-remote-code`",
        differs="weights.files.modeling_own.py",
        files=write_code,
        base={"trust_remote_code": True},
    ),
    Change(
        name="which weight files are read (`*.index.json`)",
        differs="weights.files.model.safetensors.index.json",
        files=write_index,
    ),
    Change(
        name="an adapter in the model's directory that is added to its weights (Jina)",
        differs="weights.files.adapters/retrieval/adapter_config.json",
        both=set_in("model_config", _architecture="JinaEmbeddingsV5Model"),
        files=write_merged_adapter,
    ),
    Change(
        name="the tokenizer's files, of a model that computes with it (Engram)",
        differs="weights.files.vocab.json",
        both=set_in("model_config", _architecture="DeepseekV41ForCausalLM"),
        files=write_tokenizer,
    ),
    Change(
        name="vLLM's version, every digit of it",
        differs="engine",
        patch=lambda patch: patch.setattr(fingerprint, "version", "0.32.1"),
    ),
    Change(
        name="the Transformers library's version, for models that run on it",
        differs="libraries.transformers",
        both=set_in("model_config", _architecture="Olmo2ForCausalLM"),
        patch=lambda patch: patch.setattr("importlib.metadata.version", lambda _name: "9.9"),
    ),
    Change(name="`--model-impl`", differs="code.model_impl", arguments={"model_impl": "vllm"}),
    Change(name="`--load-format`", differs="loading", arguments={"load_format": "safetensors"}),
    Change(
        name="`--quantization`",
        differs="quantization",
        config=set_in("model_config", quantization="awq"),
    ),
    Change(
        name="adapters being enabled, of quantised models",
        differs="quantized_kernels.adapters",
        both=quantized,
        arguments={"enable_lora": True, "max_lora_rank": 8},
    ),
    Change(
        name="`--enable-expert-parallel`, `--all2all-backend`, data parallel, of quantised models",
        differs="quantized_kernels.enable_expert_parallel",
        both=quantized,
        config=set_in("parallel_config", enable_expert_parallel=True),
    ),
    Change(name="`--dtype`", differs="dtype", arguments={"dtype": "bfloat16"}),
    Change(
        name="`--kv-cache-dtype`",
        differs="kv_cache_dtype",
        config=set_in("cache_config", cache_dtype="fp8"),
    ),
    Change(
        name="the cache's element type, as resolved",
        differs="groups",
        caches={"dtype": torch.bfloat16},
    ),
    Change(
        name="the cache's layout",
        differs="kv_cache_layout",
        caches={"kv_cache_layout": "HND"},
    ),
    Change(name="`--block-size`", differs="groups", arguments={"block_size": 32}),
    Change(name="`blocks_per_chunk`", differs="chunks", options={"blocks_per_chunk": 2}),
    Change(
        name="`--prefix-caching-hash-algo`",
        differs="hash.algorithm",
        arguments={"prefix_caching_hash_algo": "sha256_cbor"},
    ),
    Change(name="`PYTHONHASHSEED`", differs="hash.seed", env={"PYTHONHASHSEED": "7"}),
    Change(
        name="`--tensor-parallel-size`",
        differs="topology.tensor",
        arguments={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ),
    Change(
        name="`--pipeline-parallel-size`",
        differs="topology.pipeline",
        arguments={"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    ),
    Change(
        name="context parallel sizes",
        differs="topology.decode_context",
        config=set_in("parallel_config", decode_context_parallel_size=2),
    ),
    Change(
        name="the attention backend, or what a CPU kernel packs for",
        differs="backends",
        account={"backends": ("Attention CPU_ATTN isa=amx float32[2, 128, 64]",)},
    ),
    Change(name="the model runner", differs="runner", account={"runner": "v2"}),
    Change(name="the kind of device", differs="device", account={"device": "cuda:cuda"}),
    Change(
        name="the environment's settings of precision (`VLLM_MARLIN_INPUT_DTYPE` and others)",
        differs="precision",
        env={"VLLM_MARLIN_INPUT_DTYPE": "fp8"},
    ),
    Change(
        name="settings that vLLM's kernels read undeclared (`FLA_TRIL_PRECISION`, `FLA_USE_FAST_OPS`)",
        differs="precision.FLA_USE_FAST_OPS",
        env={"FLA_USE_FAST_OPS": "1"},
    ),
    Change(
        name="`--additional-config`",
        differs="additional_config",
        arguments={"additional_config": {"layout": "own"}},
    ),
    Change(
        name="`--max-model-len` of a model whose RoPE or code depends on it",
        differs="max_model_len",
        model="phi3",
        arguments={"max_model_len": 4096},
    ),
    Change(
        name="`--max-model-len auto` of such a model, against the length that memory left it",
        differs="max_model_len",
        model="phi3",
        arguments={"max_model_len": -1},
        config=set_in("model_config", max_model_len=2048),
    ),
    Change(
        name="token ids in the config of a model that computes with them (n-gram embeddings)",
        differs="model_config.eos_token_id",
        both=set_in("model_config", _architecture="LongcatFlashNgramForCausalLM"),
        files=edit_config(eos_token_id=5),
    ),
)
"""Each gives other bytes for the same tokens, or might."""

HARMLESS = (
    Change(name="`--max-model-len` of all other models", arguments={"max_model_len": 1024}),
    Change(
        name="batch sizes and scheduling",
        arguments={
            "max_num_batched_tokens": 4096,
            "max_num_seqs": 7,
            "enable_chunked_prefill": False,
        },
    ),
    Change(
        name="memory and the number of blocks",
        arguments={"gpu_memory_utilization": 0.5},
        options={"cpu_bytes_to_use": 2**30},
        caches={"num_blocks": 99},
        env={"VLLM_CPU_KVCACHE_SPACE": "2"},
    ),
    Change(
        name="ports, addresses, logs",
        arguments={"disable_log_stats": True, "master_port": 23456},
    ),
    Change(name="`--served-model-name`", arguments={"served_model_name": "another"}),
    Change(name="`--seed`, sampling defaults", arguments={"seed": 3, "generation_config": "vllm"}),
    Change(name="`--enforce-eager`, compilation", arguments={"enforce_eager": False}),
    Change(
        name="adapters being enabled, of models that are not quantised",
        arguments={"enable_lora": True, "max_lora_rank": 8},
    ),
    Change(name="`blocks_per_chunk` of 1, the default", options={"blocks_per_chunk": 1}),
    Change(
        name="limits and processing of pictures and sound",
        both=with_pictures(),
        config=with_pictures(mm_processor_kwargs={"num_crops": 4}, limit_per_prompt={"image": 2}),
    ),
    Change(
        name="names and token ids in the model's config, for all other models",
        files=edit_config(eos_token_id=5, transformers_version="4.0.0"),
    ),
    Change(
        name="the same in the config of a part of the model",
        both=lambda config: setattr(config.model_config.hf_config, "part", {"heads": 2}),
        config=lambda config: setattr(
            config.model_config.hf_config, "part", {"heads": 2, "eos_token_id": 5, "id2label": {}}
        ),
    ),
)
"""None of these changes what a chunk holds."""

PLUG_IN = "the code of a plug-in's model or quantisation"
CAPABILITY = "the compute capability of the devices, for quantised models and caches"
ELSEWHERE = "the model's path, copied or linked"
OTHER_KEYS = "`cache_salt`"
BYPASSED = "an adapter (LoRA), by default"
EMBEDDINGS = "embeddings in a prompt (`--enable-prompt-embeds`)"
BY_CONTENT = "an adapter with `adapters=content`"
REPLACED_ADAPTER = "an adapter replaced while its engine runs"
CALLED = "weights replaced at run time through `collective_rpc`"
SWITCHED_OFF = "weights updated at run time, with a reset of the connector's cache"

OFF = (
    (
        Change(
            name="`xxhash` without `PYTHONHASHSEED`",
            arguments={"prefix_caching_hash_algo": "xxhash"},
        ),
        "set PYTHONHASHSEED",
    ),
    (
        Change(name="`--load-format dummy`", arguments={"load_format": "dummy"}),
        "load real weights",
    ),
    (
        Change(
            name="a load format that reads weights from elsewhere",
            config=set_in("load_config", load_format="tensorizer"),
        ),
        "use load_format=auto",
    ),
    (
        Change(name="`--load-format npcache`", config=set_in("load_config", load_format="npcache")),
        "use load_format=auto",
    ),
    (
        Change(name="a plug-in's loader under the name of one of vLLM's", patch=plug_in_loader),
        "is a plug-in's",
    ),
    (
        Change(
            name="a pattern of `sharded_state` that names directories",
            config=set_in(
                "load_config",
                load_format="sharded_state",
                model_loader_extra_config={"pattern": "/other/model-{rank}-{part}.safetensors"},
            ),
        ),
        "use a pattern of names alone",
    ),
    (
        Change(
            name="text weights of another repository (Ultravox)",
            config=lambda config: setattr(
                config.model_config.hf_config, "text_model_id", "org/text"
            ),
        ),
        "serve a model that holds all of its weights",
    ),
    (
        Change(
            name="a quantisation that is read from a file of its own (`quantization_config_file`)",
            config=set_in("model_config", hf_overrides={"quantization_config_file": "q.json"}),
        ),
        "quantization_config_dict_json",
    ),
    (
        Change(
            name="code of a hub on the Transformers backend (`--trust-remote-code`)",
            config=on_transformers(auto_map={"AutoModel": "modeling.Own"}, model="org/name"),
        ),
        "download the model with its code",
    ),
    (
        Change(
            name="a plug-in's model or quantisation whose code cannot be found",
            config=set_in("model_config", _architecture="SomebodysOwnForCausalLM"),
        ),
        "install it as a package",
    ),
    (
        Change(
            name="another `--tokenizer` under a model that computes with it (Engram)",
            config=set_in(
                "model_config", _architecture="DeepseekV41ForCausalLM", tokenizer="org/other"
            ),
        ),
        "serve the model with its own tokenizer",
    ),
    (
        Change(
            name="`--enable-elastic-ep`",
            config=set_in("parallel_config", enable_elastic_ep=True),
        ),
        "takes weights from its peers",
    ),
    (
        Change(
            name="`--speculative-config`",
            arguments={
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
        ),
        "run without it",
    ),
    (
        Change(
            name="diffusion, attention that is not causal",
            config=set_in("attention_config", use_non_causal=True),
        ),
        "depends on what comes after it",
    ),
    (
        Change(
            name="a model whose prompt is not computed causally (prefix LM)",
            spec=lambda spec: replace(spec, non_causal=True),
        ),
        "depends on what comes after it",
    ),
    (
        Change(name="a window over generated tokens alone (R-SWA)", spec=as_rswa),
        "depends on where its prompt ended",
    ),
    (
        Change(
            name="`--weight-transfer-config`",
            config=lambda config: object.__setattr__(config, "weight_transfer_config", object()),
        ),
        "weight_transfer_config lets a trainer replace the weights",
    ),
    (
        Change(
            name="a model of a hub whose commit is not known",
            config=set_in("model_config", model="nobody/nothing"),
        ),
        "--revision with a full commit",
    ),
)
"""What cannot be established, with a part of the sentence that says what would settle it."""

REPLACED = "weights replaced while the engine starts"


@pytest.fixture
def fields_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Change], Any]:
    """Give a function that returns the fields before and after a change."""

    def pair(change: Change) -> tuple[Any, Any]:
        model = models.tiny(change.model)
        before = engine_fields(
            model, Change(name="", base=change.base, both=change.both, model=change.model)
        )
        if change.files is not None:
            model = Path(shutil.copytree(model, tmp_path / "model"))
            change.files(model)
        for name, value in change.env.items():
            monkeypatch.setenv(name, value)
        if change.patch is not None:
            change.patch(monkeypatch)
        return before, engine_fields(model, change)

    return pair


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.name)
def test_what_may_change_kv_changes_the_namespace(
    change: Change, fields_of: Callable[[Change], Any]
) -> None:
    """The field that says so is among those that differ."""
    one, other = fields_of(change)

    differences = diff_fields(one, other)
    assert any(line.startswith(change.differs) for line in differences), differences
    assert namespace_id(one) != namespace_id(other)


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.name)
def test_what_cannot_change_kv_changes_nothing(
    change: Change, fields_of: Callable[[Change], Any]
) -> None:
    """Not a single field differs, so hits are kept."""
    one, other = fields_of(change)

    assert [] == diff_fields(one, other)
    assert namespace_id(one) == namespace_id(other)


def test_the_same_weights_are_the_same_wherever_they_lie(tiny_llama: Path, tmp_path: Path) -> None:
    """A copy and a link to it have the namespace of the original."""
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(copy)
    change = Change(name=ELSEWHERE)

    original = engine_fields(tiny_llama, change)
    assert original == engine_fields(copy, change)
    assert original == engine_fields(tmp_path / "link", change)


@pytest.mark.parametrize(("change", "sentence"), OFF, ids=lambda part: getattr(part, "name", ""))
def test_what_cannot_be_established_is_one_sentence(
    tiny_llama: Path, change: Change, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an engine runs without the store, and its log says what would settle it."""
    if change.patch is not None:
        change.patch(monkeypatch)
    with pytest.raises(InvalidError, match=sentence) as raised:
        engine_fields(tiny_llama, change)

    assert "\n" not in str(raised.value)


def test_weights_replaced_while_an_engine_starts_are_not_believed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """What lies there may not be what was loaded; the kernel's change time tells."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    change = Change(name=REPLACED)

    with pytest.raises(InvalidError, match="restart the engine to use the store"):
        engine_fields(model, change, loaded_since_s=(model / "config.json").stat().st_ctime - 60)


def test_a_fixed_seed_makes_a_fast_hash_shareable(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PYTHONHASHSEED set everywhere to one value, keys agree; another value is another world."""
    fields = []
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        change = Change(name="", arguments={"prefix_caching_hash_algo": "xxhash"})
        fields.append(engine_fields(tiny_llama, change))

    assert fields[0] == fields[2]
    assert [line.partition(":")[0] for line in diff_fields(fields[0], fields[1])] == ["hash.seed"]


def test_a_salt_gives_other_keys() -> None:
    """Requests with different salts share no key, within one namespace; without one they do."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)
    keys = [
        Request("r", list(range(64)), SamplingParams(), None, cache_salt=salt, block_hasher=hasher)
        for salt in (None, "a", "b", None)
    ]
    hashes = [set(request.block_hashes) for request in keys]

    assert hashes[0] == hashes[3]
    assert 4 * 3 == len(hashes[0] | hashes[1] | hashes[2])


def test_each_setting_of_precision_is_one_that_vllm_reads() -> None:
    """One that it does not know would be the same for every engine."""
    assert not set(fingerprint.PRECISION_SETTINGS) - envs.environment_variables.keys()


def test_the_documents_table_is_these_tests() -> None:
    """Every row of the table in docs/vllm.md is a case here or on the engine, with its outcome."""
    tested = {
        **{change.name: "another namespace" for change in OTHERS},
        **{change.name: "same" for change in HARMLESS},
        **{change.name: "store off" for change, _ in OFF},
        PLUG_IN: "another namespace",
        CAPABILITY: "another namespace",
        ELSEWHERE: "same",
        REPLACED: "store off",
        OTHER_KEYS: "other keys",
        BYPASSED: "passes by",
        EMBEDDINGS: "passes by",
        BY_CONTENT: "other keys",
        REPLACED_ADAPTER: "passes by",
        CALLED: "store off",
        SWITCHED_OFF: "store off",
    }
    section = DOCS.read_text().partition("## When chunks are shared")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!change|---)(.+?) \| ([\w ]+?) \|", section, re.MULTILINE)

    assert tested == dict(rows)
    assert len(tested) == len(rows)
