"""The namespace from real engine configs: what must differ differs, what need not does not.

No engine runs here: configs are built as vLLM builds them, from its own arguments. The tables below read
like the one in docs/vllm.md, and a test holds the two together.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from prefixstore.errors import InvalidError
from prefixstore.keys import namespace_id
from prefixstore.tree.root import diff_fields
from prefixstore.vllm.backends import WorkerAccount, describe_worker, join_accounts
from prefixstore.vllm.fingerprint import scheduler_fields
from prefixstore.vllm.layout import SlotLayout, Span
from prefixstore.vllm.model_code import find_code
from prefixstore.vllm.weights import WeightDigests
from tests.vllm import models

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
ACCOUNT = WorkerAccount(
    rank=0,
    layout=SlotLayout(page_bytes=4096, spans={0: [Span(0, 4096)]}),
    element_bytes=4,
    backends=("Attention CPU_ATTN CPUAttentionBackendImpl isa=vec float32[2, 128, 64]",),
    runner="v1",
    device="cpu:cpu",
)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give vLLM what it needs to build a config here, and no seed of the surroundings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change to an engine.

    Attributes:
        name: What the documents call it.
        differs: The field in which the namespaces then differ.
        arguments: Of ``EngineArgs``.
        options: Of ``kv_connector_extra_config``.
        env: The environment.
        files: Edits the model's directory in place.
        config: Edits the finished config, where this machine's vLLM refuses the argument.
        caches: Fields of ``KVCacheConfig`` and of its one group's spec.
        account: Fields of what the worker says of itself.
        base: Arguments of both engines.
        model: The tiny model of both engines.
    """

    name: str
    differs: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    files: Callable[[Path], None] | None = None
    config: Callable[[VllmConfig], None] | None = None
    caches: Mapping[str, Any] = field(default_factory=dict)
    account: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    model: str = "llama"


def engine_fields(model: Path, change: Change, *, loaded_since_s: float = math.inf) -> Any:
    """Return the namespace's fields of an engine that a change would start on a model."""
    given: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True}
    transfer = KVTransferConfig(
        kv_connector="PrefixStoreConnector",
        kv_connector_module_path="prefixstore.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"root": "/kv", **change.options},
    )
    arguments = {**given, "kv_transfer_config": transfer, **change.base, **change.arguments}
    config = EngineArgs(model=str(model), **arguments).create_engine_config()
    if change.config is not None:
        change.config(config)
    spec = {
        "block_size": config.cache_config.block_size or 128,
        "num_kv_heads": 2,
        "head_size": 64,
        "dtype": torch.float32,
    }
    cache = {"num_blocks": 10, "hash_block_size": spec["block_size"]}
    for name, value in change.caches.items():
        (spec if name in spec else cache)[name] = value
    caches = KVCacheConfig(
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec(layer_names=["a", "b"], kv_cache_spec=FullAttentionSpec(**spec))
        ],
        **cache,
    )
    fields = scheduler_fields(
        config, caches, digests=WeightDigests(None), loaded_since_s=loaded_since_s
    )
    return {**fields, **join_accounts([replace(ACCOUNT, **change.account)])}


def edit_one_tensor(model: Path) -> None:
    """Change one element of one tensor; size, names and everything else stay."""
    tensors = load_file(model / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(**fields: Any) -> Callable[[Path], None]:
    """Return an edit of a model's config.json."""

    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def set_in(section: str, **values: Any) -> Callable[[VllmConfig], None]:
    """Return an edit of one part of a finished config."""

    def edit(config: VllmConfig) -> None:
        for name, value in values.items():
            object.__setattr__(getattr(config, section), name, value)

    return edit


def write_code(model: Path) -> None:
    """Put code into a model's directory."""
    (model / "modeling_own.py").write_text("SCALE = 2\n")


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
    Change(name="`--model-impl`", differs="code.model_impl", arguments={"model_impl": "vllm"}),
    Change(name="`--load-format`", differs="loading", arguments={"load_format": "safetensors"}),
    Change(
        name="`--quantization`",
        differs="quantization",
        config=set_in("model_config", quantization="awq"),
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
    Change(name="adapters being enabled", arguments={"enable_lora": True, "max_lora_rank": 8}),
    Change(
        name="names and token ids in the model's config",
        files=edit_config(eos_token_id=5, transformers_version="4.0.0"),
    ),
)
"""None of these changes what a chunk holds."""

ELSEWHERE = "the model's path, copied or linked"
OTHER_KEYS = "`cache_salt`"
BYPASSED = "an adapter (LoRA), by default"
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
        before = engine_fields(model, Change(name="", base=change.base, model=change.model))
        if change.files is not None:
            model = Path(shutil.copytree(model, tmp_path / "model"))
            change.files(model)
        for name, value in change.env.items():
            monkeypatch.setenv(name, value)
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
    tiny_llama: Path, change: Change, sentence: str
) -> None:
    """Such an engine runs without the store, and its log says what would settle it."""
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


@pytest.mark.parametrize(
    ("architecture", "reads"),
    [
        ("LlamaForCausalLM", (False, False)),
        ("Qwen3MoeForCausalLM", (False, False)),
        ("DeepseekV3ForCausalLM", (False, False)),
        ("Gemma3ForCausalLM", (False, False)),
        ("Llama4ForCausalLM", (True, True)),
        ("MiniMaxM2ForCausalLM", (True, False)),
        ("SomebodysOwnForCausalLM", (True, True)),
    ],
)
def test_the_source_of_a_model_says_which_settings_it_reads(
    architecture: str, reads: tuple[bool, bool]
) -> None:
    """Only models that read the context length or the generation config have it in their namespace."""
    code = find_code(architecture)

    assert reads == (code.reads_length, code.reads_generation)


def test_the_documents_table_is_these_tests() -> None:
    """Every row of the table in docs/vllm.md is a case here or on the engine, with its outcome."""
    tested = {
        **{change.name: "another namespace" for change in OTHERS},
        **{change.name: "same" for change in HARMLESS},
        **{change.name: "store off" for change, _ in OFF},
        ELSEWHERE: "same",
        REPLACED: "store off",
        OTHER_KEYS: "other keys",
        BYPASSED: "passes by",
        BY_CONTENT: "other keys",
        REPLACED_ADAPTER: "passes by",
        CALLED: "store off",
        SWITCHED_OFF: "store off",
    }
    section = DOCS.read_text().partition("## When chunks are shared")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!change|---)(.+?) \| ([\w ]+?) \|", section, re.MULTILINE)

    assert tested == dict(rows)
    assert len(tested) == len(rows)


def test_fp8_of_another_bias_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices under one name and one dtype of cache, of which one biases FP8 otherwise, never share."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}), use_v2_model_runner=False
    )
    caches = {"layer": torch.zeros((2, 4), dtype=torch.uint8)}
    devices = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        monkeypatch.setattr(type(current_platform), "fp8_dtype", classmethod(lambda _, d=dtype: d))
        account = describe_worker(config, caches, rank=0, layout=ACCOUNT.layout)
        devices.append(account.device)

    assert len(set(devices)) == 2, devices
