"""Engines with which equal fields do not mean equal KV: each is refused by a sentence that says what to do.

Such an engine serves with the store off. What shapes of models cannot be served is ``shapes``' to say; here
is what would make a namespace lie: KV that depends on more than the tokens before it, weights or code that
nothing names.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.version import __version__ as version

from prefixstore.errors import InvalidError
from prefixstore.vllm.compat import find_loader
from prefixstore.vllm.model_code import ModelCode

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["refuse_loading", "refuse_moving_code", "refuse_strange_tokenizer", "refuse_unknowable"]

LOAD_FORMATS = frozenset(
    {
        "auto",
        "fastsafetensors",
        "hf",
        "instanttensor",
        "mistral",
        "pt",
        "runai_streamer",
        "safetensors",
        "sharded_state",
    }
)
"""Ways of loading that read the files of the model's own directory, and no others: ``npcache`` reads what an
earlier start left beside them."""


def refuse_unknowable(config: "VllmConfig", caches: "KVCacheConfig") -> None:
    """Refuse settings and models whose KV no fields could tell.

    Raises:
        InvalidError: This engine is one.
    """
    _refuse_kv_of_more_than_tokens(config, caches)
    _refuse_unnamed_weights(config)
    if version == "dev":
        raise InvalidError(
            "this build of vLLM does not know its version, so nothing names its code: install it with "
            "its version file (vllm/_version.py), or run without prefixstore"
        )


def _refuse_kv_of_more_than_tokens(config: "VllmConfig", caches: "KVCacheConfig") -> None:
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise InvalidError(
            "KV scales are computed from the first requests (calculate_kv_scales), so equal tokens "
            "do not give equal KV: use a checkpoint with KV scales, or another kv_cache_dtype"
        )
    if config.speculative_config is not None:
        raise InvalidError(
            "speculative decoding changes which blocks are final and was never tried with "
            "prefixstore: run without it, or without prefixstore"
        )
    attention = getattr(config, "attention_config", None)
    specs = list(_specs(caches))
    if (
        getattr(config, "diffusion_config", None)
        or getattr(attention, "use_non_causal", False)
        or any(getattr(spec, "non_causal", False) for spec in specs)
    ):
        raise InvalidError(
            "a model that computes tokens by diffusion or without causal attention has KV that depends "
            "on what comes after it, which block hashes do not tell: run it without prefixstore"
        )
    if any(getattr(spec, "rswa_window", None) is not None for spec in specs):
        raise InvalidError(
            "a model whose window slides over generated tokens alone (R-SWA) has KV that depends on "
            "where its prompt ended, which block hashes do not tell: run it without prefixstore"
        )


def _refuse_unnamed_weights(config: "VllmConfig") -> None:
    if getattr(config, "weight_transfer_config", None) is not None:
        raise InvalidError(
            "weight_transfer_config lets a trainer replace the weights while the engine runs, and "
            "nothing names the new ones: run without it, or without prefixstore"
        )
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise InvalidError(
            "an engine that grows while it runs (enable_elastic_ep) takes weights from its peers, and "
            "nothing names them: run without it, or without prefixstore"
        )
    model = config.model_config
    if (other := getattr(model.hf_config, "text_model_id", None)) is not None:
        raise InvalidError(
            f"the text model's weights come from another repository ({other}), whose branch may move: "
            "serve a model that holds all of its weights, or run without prefixstore"
        )
    overrides = model.hf_overrides if isinstance(model.hf_overrides, Mapping) else {}
    if (file := overrides.get("quantization_config_file")) is not None:
        raise InvalidError(
            f"the quantization is read from {file}, whose content nothing names: give the content "
            "itself, as quantization_config_dict_json in --hf-overrides"
        )


def refuse_loading(load: Any) -> None:
    """Refuse ways of loading that give other weights than those of the model's own directory.

    Raises:
        InvalidError: They are drawn at random, or may come from elsewhere.
    """
    if load.load_format == "dummy":
        raise InvalidError(
            "load_format=dummy draws weights at random, so no other engine has the same: load real "
            "weights, or run without prefixstore"
        )
    loader = find_loader(load.load_format)
    if (
        load.load_format not in LOAD_FORMATS
        or loader is None
        or not loader.__module__.startswith("vllm.")
    ):
        raise InvalidError(
            f"load_format={load.load_format} may read weights from outside the model's directory, or "
            "is a plug-in's, and nothing identifies them: use load_format=auto, or run without "
            "prefixstore"
        )
    extra = load.model_loader_extra_config
    pattern = extra.get("pattern") if isinstance(extra, Mapping) else None
    if pattern is not None and "/" in str(pattern):
        raise InvalidError(
            f"the loader's pattern {pattern!r} reads weights from other directories than the model's, "
            "where nothing identifies them: use a pattern of names alone"
        )


def refuse_moving_code(model: Any, code: ModelCode) -> None:
    """Refuse code of a hub's repository whose branch decides what runs.

    The Transformers backend builds models by ``AutoModel.from_config``, which knows no revision: whatever
    ``--revision`` and ``--code-revision`` say, the code is that of ``main`` of the repository that the
    config came from, or of the one that ``auto_map`` names.

    Raises:
        InvalidError: Such code runs.
    """
    if not model.trust_remote_code or not code.is_transformers:
        return
    auto_map = getattr(model.hf_config, "auto_map", None) or {}
    classes = [str(name) for kind, name in auto_map.items() if str(kind).startswith("AutoModel")]
    if not classes:
        return
    borrowed = next((name for name in classes if "--" in name), None)
    config_path = getattr(model, "hf_config_path", None)
    is_own = Path(model.model).exists() and config_path in {None, model.model}
    if borrowed is not None or not is_own:
        raise InvalidError(
            f"the model runs code of {borrowed or config_path or model.model} from a hub, or from "
            "elsewhere, and always that of its newest version: download the model with its code, serve "
            "that directory, and let auto_map in its config.json name no other repository"
        )


def refuse_strange_tokenizer(model: Any, code: ModelCode) -> None:
    """Refuse a tokenizer from elsewhere under a model that computes with it (Engram's hashes of n-grams).

    Raises:
        InvalidError: It is one.
    """
    if code.reads_tokenizer and model.tokenizer not in {None, model.model}:
        raise InvalidError(
            f"this model may compute with its tokenizer, and nothing names that of {model.tokenizer}: "
            "serve the model with its own tokenizer, or run without prefixstore"
        )


def _specs(caches: "KVCacheConfig") -> Iterator[Any]:
    """Yield what is kept for each kind of layer, and the kinds inside a group of several."""
    for group in caches.kv_cache_groups:
        yield group.kv_cache_spec
        inside = getattr(group.kv_cache_spec, "kv_cache_specs", None) or {}
        yield from inside.values()
