"""The namespace of an engine: everything that decides a chunk's bytes besides its tokens.

Fields come from the real ``VllmConfig`` and ``KVCacheConfig``, and from the workers for what is chosen
there (attention backend, runner, byte layout). What cannot be established raises ``InvalidError`` with
the option that would settle it: such an engine runs without the store. A field too many costs a miss;
a field too few would cost a wrong answer, so unknown parts of the model's config are included whole.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

from prefixstore.errors import InvalidError
from prefixstore.keys import Fields
from prefixstore.vllm.weights import WeightDigests, identify_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.config import OffloadingConfig

__all__ = ["SCHEME", "bare_fields", "scheduler_fields"]

SCHEME = 1
"""Version of this very recipe: it changes when a field is added or its meaning changes, so that
namespaces made by different recipes never meet."""

HARMLESS_CONFIG_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",  # the resolved class is a field of its own
        "bos_token_id",
        "dtype",  # the resolved dtype is a field of its own
        "eos_token_id",
        "id2label",
        "label2id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a Hugging Face config that cannot change KV: names, token ids used after sampling."""


def scheduler_fields(
    config: "VllmConfig", caches: "KVCacheConfig", *, digests: WeightDigests
) -> Fields:
    """Return the fields that the scheduler's process knows.

    Raises:
        InvalidError: Something that decides KV cannot be established.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if getattr(cache, "calculate_kv_scales", False):
        raise InvalidError(
            "KV scales are computed from the first requests (calculate_kv_scales), so equal tokens "
            "do not give equal KV: use a checkpoint with KV scales, or another kv_cache_dtype"
        )
    if config.speculative_config is not None:
        raise InvalidError(
            "speculative decoding changes which blocks are final and was never tried with "
            "prefixstore: run without it, or without prefixstore"
        )
    return {
        "scheme": SCHEME,
        "weights": identify_weights(model.model, model.revision, digests=digests),
        "loading": _loading(config.load_config),
        "architecture": model.architecture,
        "code": {
            name: _plain(getattr(model, name, None))
            for name in ("code_revision", "convert_type", "model_class_overrides", "runner_type")
        },
        "quantization": _plain(model.quantization),
        "quantization_config": _plain(getattr(model, "quantization_config", None)),
        "model_config": _model_config(model.hf_config),
        # Not only a limit: it chooses between RoPE's short and long factors (Phi-3), and turns on
        # attention temperature (Llama 4).
        "max_model_len": model.max_model_len,
        # How a picture becomes tokens; a block hash knows the picture.
        "multimodal": _plain(getattr(model, "multimodal_config", None)),
        "dtype": _plain(model.dtype),
        "kv_cache_dtype": _plain(model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype),
        "kv_cache_layout": _plain(caches.kv_cache_layout or cache.kv_cache_layout),
        "groups": [_group(group) for group in caches.kv_cache_groups],
        "mamba": {
            name: _plain(getattr(cache, name, None))
            for name in ("mamba_cache_mode", "mamba_cache_dtype", "mamba_ssm_cache_dtype")
        },
        "chunks": {
            "tokens_per_hash": _plain(caches.hash_block_size),
            "blocks_per_chunk": _plain(_option(config, "blocks_per_chunk")),
            "block_size": _plain(_option(config, "block_size")),
        },
        "hash": _hash_scheme(cache.prefix_caching_hash_algo),
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


def _loading(load: Any) -> Mapping[str, object]:
    """Name how the weights' files become weights.

    Raises:
        InvalidError: They do not: the weights are drawn at random.
    """
    if load.load_format == "dummy":
        raise InvalidError(
            "load_format=dummy draws weights at random, so no other engine has the same: load real "
            "weights, or run without prefixstore"
        )
    return {
        "format": _plain(load.load_format),
        "extra_config": _plain(load.model_loader_extra_config),
    }


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


def _model_config(config: Any) -> Mapping[str, object]:
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in HARMLESS_CONFIG_FIELDS
    }
    plain = _plain(fields)
    assert isinstance(plain, dict), "to_dict gives a dict"
    return plain


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
            if " object at 0x" in plain:
                raise InvalidError(
                    "a part of the model's config has no stable text "
                    f"({type(value).__name__}), so two engines cannot be compared by it"
                )
    return plain
