"""Namespaces of engines that nobody starts: configs as vLLM builds them, from its own arguments, and edits."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)

from prefixstore.vllm.backends import WorkerAccount, describe_worker, join_accounts
from prefixstore.vllm.fingerprint import scheduler_fields
from prefixstore.vllm.layout import SlotLayout, Span
from prefixstore.vllm.weights import WeightDigests


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
        spec: Makes another spec of the group's.
        account: Fields of what the worker says of itself.
        patch: Changes what is installed.
        base: Arguments of both engines.
        both: Edits the finished config of both engines, before ``config`` does.
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
    spec: Callable[[FullAttentionSpec], KVCacheSpec] = lambda spec: spec
    account: Mapping[str, Any] = field(default_factory=dict)
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    both: Callable[[VllmConfig], None] | None = None
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
    for edit in (change.both, change.config):
        if edit is not None:
            edit(config)
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
            KVCacheGroupSpec(
                layer_names=["a", "b"], kv_cache_spec=change.spec(FullAttentionSpec(**spec))
            )
        ],
        **cache,
    )
    fields = scheduler_fields(
        config, caches, digests=WeightDigests(None), loaded_since_s=loaded_since_s
    )
    account = describe(caches.num_blocks)
    return {**fields, **join_accounts([replace(account, **change.account)])}


def describe(
    blocks: int,
    *,
    order: tuple[int, ...] = (0, 1, 2, 3),
    quantized: bool = False,
    cache_dtype: str = "auto",
) -> WorkerAccount:
    """Return what a worker says of a cache, whose axes lie in some order in memory."""
    sizes = (blocks, 2, 128, 64)
    stored = torch.zeros([sizes[axis] for axis in order])
    return describe_worker(
        SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            use_v2_model_runner=False,
            quant_config=object() if quantized else None,
            cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        ),
        {"layer": stored.permute([order.index(axis) for axis in range(len(order))])},
        rank=0,
        layout=SlotLayout(page_bytes=4096, spans={0: [Span(0, 4096)]}),
    )


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


def on_transformers(*, auto_map: Mapping[str, str], model: str | None = None) -> Any:
    """Return an edit that runs a model's own code on the Transformers backend."""

    def edit(config: VllmConfig) -> None:
        set_in(
            "model_config",
            _architecture="TransformersForCausalLM",
            trust_remote_code=True,
            model=model or config.model_config.model,
        )(config)
        config.model_config.hf_config.auto_map = dict(auto_map)

    return edit
