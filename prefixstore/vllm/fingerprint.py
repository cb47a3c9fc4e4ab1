"""The namespace of an engine: everything that decides a chunk's bytes besides its tokens.

Fields come from the real ``VllmConfig`` and ``KVCacheConfig``, and from the workers for what is chosen
there (attention backend, runner, byte layout). What cannot be established raises ``InvalidError`` with
the option that would settle it: such an engine runs without the store. A field too many costs a miss;
a field too few would cost a wrong answer, so unknown parts of the model's config are included whole.

What is left out, and why it may be, is named here: ``HARMLESS_*``, and whatever ``scheduler_fields`` does
not read (batch sizes, memory, ports, compilation: they choose how KV is computed, not which).
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed
from vllm.version import __version__ as version

from prefixstore.errors import InvalidError
from prefixstore.keys import Fields
from prefixstore.vllm.compat import registered_architecture
from prefixstore.vllm.foreign_code import digest_code
from prefixstore.vllm.model_code import ModelCode, find_code
from prefixstore.vllm.refusals import (
    refuse_loading,
    refuse_moving_code,
    refuse_strange_tokenizer,
    refuse_unknowable,
)
from prefixstore.vllm.weights import (
    WeightDigests,
    WeightSource,
    identify_weights,
    process_start_s,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.config import OffloadingConfig

__all__ = ["SCHEME", "bare_fields", "scheduler_fields"]

SCHEME = 5
"""Version of this very recipe: it changes when a field is added or its meaning changes, so that
namespaces made by different recipes never meet."""

HARMLESS_CONFIG_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",  # the resolved class is a field of its own
        "dtype",  # the resolved dtype is a field of its own
        "id2label",
        "label2id",
        "max_model_len",  # some models copy the engine's limit here; it is a field of its own
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a Hugging Face config that cannot change KV: names, and what has a field of its own."""

HARMLESS_INSIDE = HARMLESS_CONFIG_FIELDS - {
    "architectures",
    "dtype",
    "max_model_len",
    "torch_dtype",
}
"""Such fields in the configs of a model's parts: names alone."""

TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
"""Used after sampling, but by few models: harmless where a model's code does not read them."""

HARMLESS_MULTIMODAL_FIELDS = frozenset(
    {
        "allow_missing_mm_embeddings",
        "enable_mm_embeds",
        "interleave_mm_strings",
        "language_model_only",
        "limit_per_prompt",
        "media_io_kwargs",
        "mm_device_do_normalize",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_margin",
        "mm_encoder_fp8_scale_save_path",
        "mm_encoder_tp_mode",
        "mm_hasher_algorithm",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_processor_kwargs",
        "mm_shm_cache_max_object_size_mb",
        "mm_tensor_ipc",
        "skip_mm_profiling",
    }
)
"""How pictures and sound are read, encoded and bounded: requests with any pass the store by."""

ROPE_TYPES_WITHOUT_LENGTH = frozenset(
    {
        "bailing_mrope",
        "deepseek_llama_scaling",
        "deepseek_yarn",
        "default",
        "linear",
        "llama3",
        "mllama4",
        "mrope",
        "ntk",
        "proportional",
        "yarn",
    }
)
"""Kinds of RoPE whose angles follow from the model's config alone, however long the engine's context.
``longrope`` takes one of two sets of factors by it (vllm/.../phi3_long_rope_scaled_rope.py), the dynamic
kinds scale by it; a kind that is not here is believed to."""

PRECISION_SETTINGS = (
    "VLLM_BATCH_INVARIANT",
    "VLLM_B12X_MOE_FP4_FORCE_A16",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER",
    "VLLM_CPU_INT4_W4A8",
    "VLLM_DEEPEPLL_NVFP4_DISPATCH",
    "VLLM_DISABLED_KERNELS",
    "VLLM_FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE",
    "VLLM_FLOAT32_MATMUL_PRECISION",
    "VLLM_HUMMING_INPUT_QUANT_CONFIG",
    "VLLM_HUMMING_ONLINE_QUANT_CONFIG",
    "VLLM_HUMMING_USE_F16_ACCUM",
    "VLLM_MARLIN_INPUT_DTYPE",
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
    "VLLM_MOE_USE_DEEP_GEMM",
    "VLLM_ROCM_FP8_MFMA_PAGE_ATTN",
    "VLLM_ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16",
    "VLLM_ROCM_QUICK_REDUCE_QUANTIZATION",
    "VLLM_ROCM_QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB",
    "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
    "VLLM_ROCM_USE_AITER",
    "VLLM_ROCM_USE_AITER_FP4BMM",
    "VLLM_ROCM_USE_AITER_FP8BMM",
    "VLLM_ROCM_USE_AITER_MOE",
    "VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4",
    "VLLM_ROCM_USE_AITER_MOE_SITUV2",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_USE_DEEP_GEMM",
    "VLLM_USE_DEEP_GEMM_E8M0",
    "VLLM_XPU_INC_WNA16_BACKEND",
)
"""Settings of vLLM's environment that quantise what is computed, choose among kernels that quantise
differently, or lay out a page, without a trace in its config. Those that only choose among equals of one
precision are left out."""

UNDECLARED_SETTINGS = ("FLA_TRIL_PRECISION", "FLA_USE_FAST_OPS")
"""Such settings that vLLM reads without declaring them (third_party/flash_linear_attention/ops)."""


def scheduler_fields(
    config: "VllmConfig",
    caches: "KVCacheConfig",
    *,
    digests: WeightDigests,
    loaded_since_s: float | None = None,
) -> Fields:
    """Return the fields that the scheduler's process knows.

    Args:
        config: The engine's config.
        caches: Its KV cache groups.
        digests: Digests of weight files.
        loaded_since_s: The earliest moment at which the weights may have been read, in seconds since
            the epoch; by default when this process began.

    Raises:
        InvalidError: Something that decides KV cannot be established.
    """
    model = config.model_config
    code = find_code(registered_architecture(model))
    since_s = loaded_since_s or process_start_s()
    refuse_unknowable(config, caches)
    refuse_moving_code(model, code)
    refuse_strange_tokenizer(model, code)
    return {
        "scheme": SCHEME,
        # The code of models, and what the kernels put where inside a page: theirs to change with any version.
        "engine": f"vllm {version}",
        "loading": _loading(config.load_config),
        "hash": _hash_scheme(config.cache_config.prefix_caching_hash_algo),
        **_model_fields(config, code),
        **_cache_fields(config, caches),
        "libraries": _libraries(config, code, digests=digests, loaded_since_s=since_s),
        # Last, since it may read all of the weights.
        "weights": identify_weights(
            _weight_source(config, code, loaded_since_s=since_s), digests=digests
        ),
    }


def _model_fields(config: "VllmConfig", code: ModelCode) -> Mapping[str, object]:
    """Return what decides the KV that the model computes, but for its weights."""
    model = config.model_config
    return {
        "architecture": model.architecture,
        "code": {
            "class": code.name,
            **_named(
                model,
                "code_revision",
                "convert_type",
                "disable_sliding_window",
                "model_class_overrides",
                "model_impl",
                "runner_type",
                "trust_remote_code",
            ),
        },
        "quantization": _plain(model.quantization),
        "quantization_config": _plain(getattr(model, "quantization_config", None)),
        "model_config": _model_config(model.hf_config, code),
        "text_config": _text_config(model, code),
        "max_model_len": _length(model) if _needs_length(model, code) else None,
        "generation_config": _generation_config(model) if code.reads_generation else None,
        "multimodal": _multimodal(getattr(model, "multimodal_config", None)),
        "dtype": _plain(model.dtype),
        # What is asked for; the backend that came of it is in the workers' account.
        "attention": _plain(getattr(config, "attention_config", None)),
        "kernels": _named(
            getattr(config, "kernel_config", None),
            "linear_backend",
            "linear_backend_per_quant",
            "moe_backend",
        ),
        "quantized_kernels": _quantized_kernels(config),
        "precision": {
            **_named(envs, *PRECISION_SETTINGS),
            **{name: os.environ.get(name) for name in UNDECLARED_SETTINGS},
        },
        # For plug-ins of other platforms, which may do anything by it.
        "additional_config": _plain(getattr(config, "additional_config", None)),
    }


def _quantized_kernels(config: "VllmConfig") -> Mapping[str, object] | None:
    """Return what kernels of a quantised model are chosen by, besides what is asked for by name.

    Those of experts that do not know adapters, or a way to spread experts, give way to others, which
    may quantise activations otherwise (vllm/.../fused_moe/modular_kernel.py, ``is_supported_config``).
    """
    if config.quant_config is None:
        return None
    parallel = config.parallel_config
    return {
        "adapters": config.lora_config is not None,
        "data_parallel": parallel.data_parallel_size > 1,
        **_named(parallel, "all2all_backend", "enable_expert_parallel"),
    }


def _cache_fields(config: "VllmConfig", caches: "KVCacheConfig") -> Mapping[str, object]:
    """Return what decides the form in which KV is kept, and how it is cut."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    return {
        "kv_cache_dtype": _plain(model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype),
        "kv_cache_layout": _plain(caches.kv_cache_layout or cache.kv_cache_layout),
        "kv_cache": _named(
            cache,
            "enable_mamba_shared_prefix_checkpoint",
            "kv_cache_dtype_skip_layers",
            "kv_sharing_fast_prefill",
            "sliding_window",
            "swa_bounded_replay",
            "use_kda_recoverssm",
            "use_replayssm",
        ),
        "groups": [_group(group) for group in caches.kv_cache_groups],
        "mamba": {
            **_named(cache, "mamba_cache_mode", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
            "kernels": _plain(getattr(config, "mamba_config", None)),
        },
        "chunks": {
            "tokens_per_hash": _plain(caches.hash_block_size),
            "blocks_per_chunk": _plain(_option(config, "blocks_per_chunk") or 1),
            "block_size": _plain(_option(config, "block_size")),
        },
        "topology": {
            "tensor": parallel.tensor_parallel_size,
            "pipeline": parallel.pipeline_parallel_size,
            "prefill_context": parallel.prefill_context_parallel_size,
            "decode_context": parallel.decode_context_parallel_size,
            "cp_interleave": parallel.cp_kv_cache_interleave_size,
            "world": parallel.world_size,
        },
    }


def bare_fields(explicit: str | None, config: "OffloadingConfig") -> Fields:
    """Return the fields of a tier that sees no model: what its user named, and the shape of its slots."""
    return {
        "explicit": explicit,
        "kv_dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "bytes_per_block": config.worker_kv_bytes_per_block,
        "world_size": config.parallel.world_size,
        "tp_size": config.parallel.tp_size,
        "pp_size": config.parallel.pp_size,
        "pcp_size": config.parallel.pcp_size,
        "dcp_size": config.parallel.dcp_size,
        "kv_cache_layout": config.kv_cache_layout,
        "canonical_layout": config.canonical_layout,
        "groups": [
            {
                "id": group.group_id,
                "tokens_per_block": group.tokens_per_block,
                "layers": list(group.layer_names),
            }
            for group in config.groups
        ],
    }


def _libraries(
    config: "VllmConfig", code: ModelCode, *, digests: WeightDigests, loaded_since_s: float
) -> Mapping[str, object]:
    """Name the code that computes KV and is none of vLLM's."""
    quantizing = type(config.quant_config).__module__ if config.quant_config is not None else ""
    outside: dict[str, str] = {
        part: digest_code(module, digests=digests, loaded_since_s=loaded_since_s)
        for part, module, is_vllms in (
            ("model", code.module, code.is_vllms),
            ("quantization", quantizing, not quantizing or quantizing.startswith("vllm.")),
        )
        if not is_vllms
    }
    if code.reads_tokenizer:
        outside["tokenizers"] = metadata.version("tokenizers")
    if code.is_transformers or outside:
        release = metadata.version("transformers")
        outside["transformers"] = (
            release
            if "dev" not in release  # A name that all of its builds have.
            else digest_code("transformers", digests=digests, loaded_since_s=loaded_since_s)
        )
    return outside


def _weight_source(config: "VllmConfig", code: ModelCode, *, loaded_since_s: float) -> WeightSource:
    model = config.model_config
    if (uri := getattr(model, "model_weights", "")) and uri != model.model:
        raise InvalidError(
            f"the weights come from {uri!r}, and no local file or commit names them: serve a local "
            "directory, or a model of the hub with --revision COMMIT"
        )
    return WeightSource(
        model=model.model,
        revision=model.revision,
        config_commit=getattr(model.hf_config, "_commit_hash", None),
        hub_cache=config.load_config.download_dir,
        runs_code=bool(model.trust_remote_code),
        reads_folders=code.reads_folders,
        reads_tokenizer=code.reads_tokenizer,
        loaded_since_s=loaded_since_s,
    )


def _loading(load: Any) -> Mapping[str, object]:
    """Name how the weights' files become weights.

    Raises:
        InvalidError: They do not, or other files do.
    """
    refuse_loading(load)
    return {
        "format": _plain(load.load_format),
        "extra_config": _plain(load.model_loader_extra_config),
        "ignore_patterns": _plain(load.ignore_patterns),
    }


def _length(model: Any) -> object:
    """Return the length of a context as the model and its runner know it.

    With ``--max-model-len auto`` the model is built with its config's own, and then told of the memory's.
    """
    is_auto = getattr(model, "original_max_model_len", None) == -1
    return {"auto": model.max_model_len} if is_auto else model.max_model_len


def _needs_length(model: Any, code: ModelCode) -> bool:
    """Whether ``max_model_len`` decides KV and is not only a limit."""
    whole, text = _model_config(model.hf_config, code), _text_config(model, code)
    kinds = {*_rope_types(whole), *_rope_types(text or {})}
    return code.reads_length or not kinds <= ROPE_TYPES_WITHOUT_LENGTH


def _rope_types(value: object) -> Iterator[str]:
    """Yield every kind of RoPE that a config names, wherever it does."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name == "rope_type" or (name == "type" and "factor" in value):
                yield str(item)
            else:
                yield from _rope_types(item)
    elif isinstance(value, list):
        for item in value:
            yield from _rope_types(item)


def _generation_config(model: Any) -> object:
    return _plain({**model.try_get_generation_config(), **model.override_generation_config})


def _text_config(model: Any, code: ModelCode) -> Mapping[str, object] | None:
    """Return the text part's config where it is an object of its own; None where it is the whole."""
    text = getattr(model, "hf_text_config", model.hf_config)
    return None if text is model.hf_config else _model_config(text, code)


def _multimodal(config: Any) -> object:
    plain = _plain(config)
    if not isinstance(plain, dict):
        return plain
    return {name: item for name, item in plain.items() if name not in HARMLESS_MULTIMODAL_FIELDS}


def _named(config: Any, *names: str) -> Mapping[str, object]:
    """Return some fields of a config; None for those that this version of vLLM does not have."""
    return {name: _plain(getattr(config, name, None)) for name in names}


def _option(config: "VllmConfig", name: str) -> Any:
    transfer = config.kv_transfer_config
    return transfer.kv_connector_extra_config.get(name) if transfer is not None else None


def _hash_scheme(algorithm: str) -> Mapping[str, object]:
    """Name the block hash and its seed; a seed that no other process knows shares nothing.

    The seed's rules are vLLM's (vllm/v1/core/kv_cache_utils.py, ``resolve_none_hash_seed``).
    """
    if "xxhash" in algorithm and os.getenv("PYTHONHASHSEED") is None:
        raise InvalidError(
            f"prefix_caching_hash_algo={algorithm} draws a random seed in each process, so no key "
            "would be found again: use sha256, or set PYTHONHASHSEED to the same value everywhere"
        )
    return {
        "algorithm": algorithm,
        "seed": resolve_none_hash_seed(get_hash_fn_by_name(algorithm)),
    }


def _model_config(config: Any, code: ModelCode) -> Mapping[str, object]:
    token_ids = frozenset() if code.reads_token_ids else TOKEN_IDS

    def without(fields: Mapping[Any, Any], harmless: frozenset[str]) -> dict[str, object]:
        """Leave out the harmless, also in the configs of parts (text, vision) inside."""
        return {
            str(name): without(value, HARMLESS_INSIDE | token_ids)
            if isinstance(value, Mapping)
            else _plain(value)
            for name, value in fields.items()
            if name not in harmless
        }

    return without(config.to_dict(), HARMLESS_CONFIG_FIELDS | token_ids)


def _group(group: Any) -> Mapping[str, object]:
    spec = group.kv_cache_spec
    return {
        "kind": type(spec).__name__,
        "spec": _plain(dataclasses.asdict(spec)),
        "page_bytes": spec.page_size_bytes,
        "layers": list(group.layer_names),
    }


def _plain(value: Any) -> object:
    """Turn a config value into JSON: containers kept, anything unknown by its name or text."""
    match value:
        case None | bool() | int() | float() | str():
            plain: object = value
        case Mapping():
            plain = {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            plain = [_plain(item) for item in value]
        case set() | frozenset():
            plain = sorted(str(item) for item in value)
        case type():
            plain = f"{value.__module__}.{value.__qualname__}"
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            plain = _plain(dataclasses.asdict(value))
        case _:
            plain = str(value)
            if " at 0x" in plain:
                raise InvalidError(
                    "a part of the model's config has no stable text "
                    f"({type(value).__name__}), so two engines cannot be compared by it"
                )
    return plain
