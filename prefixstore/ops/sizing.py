"""How much room prefixes take, from a model's ``config.json``: arithmetic, no engine.

A layer with attention keeps for each token a key and a value for each of its KV heads; with latent attention
(MLA) one compressed vector and one rotary key for all heads. What is stored is chunks, whole ones only: a file
with a page for the header and its payload in whole pages.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from prefixstore.blob.header import HEADER_BYTES, file_bytes
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.store.space import LOW_SHARE

__all__ = ["ELEMENT_BYTES", "KvShape", "Sizing", "read_kv_shape", "size_prompts"]

ELEMENT_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
CONFIG_BYTES_MAX = 16 * 2**20
NO_TOKENS = ("mamba", "linear_attention", "recurrent", "conv")
"""Kinds of layers that keep a state and nothing for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What a model keeps for each token.

    Attributes:
        layers: Layers with attention.
        windowed_layers: Of these, layers that look back a bounded number of tokens only.
        elements_per_layer: Numbers that each of them keeps for a token.
        dtype: The model's own dtype, as its config names it; None if it does not.
    """

    layers: int
    windowed_layers: int
    elements_per_layer: int
    dtype: str | None

    def token_bytes(self, dtype: str) -> int:
        """Return the bytes of one token's KV, all layers.

        Raises:
            InvalidError: The dtype is none that we know the size of.
        """
        size = ELEMENT_BYTES.get(dtype)
        if size is None:
            raise InvalidError(f"dtype {dtype!r} is not known; one of: {', '.join(ELEMENT_BYTES)}")
        return self.layers * self.elements_per_layer * size


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What prompts take on disk.

    Attributes:
        token_bytes: KV of one token.
        chunk_bytes: Payload of one chunk.
        chunks: Files in all.
        file_bytes: What they take.
        max_bytes: The quota under which all of them stay.
        load_bytes: Read to serve one whole prompt.
    """

    token_bytes: int
    chunk_bytes: int
    chunks: int
    file_bytes: int
    max_bytes: int
    load_bytes: int


def read_kv_shape(model: Path) -> KvShape:
    """Read a model's ``config.json``.

    Args:
        model: The model's directory, or the file itself.

    Raises:
        InvalidError: It is no config, or of a model whose KV cannot be told from it.
        UnavailableError: It cannot be read.
    """
    path = model / "config.json" if model.is_dir() else model
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise InvalidError(f"{path} is too long for a model's config.json")
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise InvalidError(
            f"{path} is not there: name a directory that holds a model's config.json, or that file"
        ) from error
    except OSError as error:
        raise UnavailableError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidError(f"{path} is not a model's config.json: {error}") from error
    text = config.get("text_config")
    return _shape(text if isinstance(text, dict) else config, path)


def size_prompts(
    shape: KvShape,
    *,
    dtype: str,
    prompts: int,
    tokens: int,
    shared_tokens: int = 0,
    chunk_tokens: int = 16,
    ratio: float = 1.0,
) -> Sizing:
    """Work out what prompts take.

    Args:
        shape: The model's.
        dtype: The KV cache's.
        prompts: Different prompts.
        tokens: Tokens of each.
        shared_tokens: How many of these all of them begin with, alike.
        chunk_tokens: Tokens in one chunk: vLLM's block size times ``blocks_per_chunk``.
        ratio: What compression leaves of a payload; 1.0 for raw.

    Raises:
        InvalidError: More tokens are shared than there are, or the dtype is unknown.
    """
    if shared_tokens > tokens:
        raise InvalidError(f"{shared_tokens} shared tokens do not fit into prompts of {tokens}")
    token_bytes = shape.token_bytes(dtype)
    chunk_bytes = token_bytes * chunk_tokens
    shared = shared_tokens // chunk_tokens
    each = tokens // chunk_tokens - shared
    chunks = shared + prompts * each if prompts else 0
    on_disk = file_bytes(math.ceil(chunk_bytes * ratio))
    # Eviction makes room down to the low share of the quota: what must stay has to fit below it.
    return Sizing(
        token_bytes=token_bytes,
        chunk_bytes=chunk_bytes,
        chunks=chunks,
        file_bytes=chunks * on_disk,
        max_bytes=math.ceil(chunks * on_disk / LOW_SHARE),
        load_bytes=(shared + each) * (on_disk - HEADER_BYTES),
    )


def _shape(config: Mapping[str, Any], path: Path) -> KvShape:
    kinds = config.get("layer_types") or config.get("layers_block_type")
    layers = _positive(config, "num_hidden_layers", path)
    windowed = 0
    if isinstance(kinds, list):
        with_tokens = [kind for kind in kinds if not str(kind).startswith(NO_TOKENS)]
        if len(with_tokens) != len(kinds):
            raise InvalidError(
                f"{path}: {len(kinds) - len(with_tokens)} layers keep a state and no KV for each token; "
                "how large it is does not follow from the config: store one prompt and read "
                "`prefixstore stats`"
            )
        windowed = sum("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds)
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        windowed = layers
    dtype = config.get("dtype") or config.get("torch_dtype")
    return KvShape(
        layers=layers,
        windowed_layers=windowed,
        elements_per_layer=_elements(config, path),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
    )


def _elements(config: Mapping[str, Any], path: Path) -> int:
    if config.get("kv_lora_rank"):
        return _positive(config, "kv_lora_rank", path) + _positive(config, "qk_rope_head_dim", path)
    heads = _positive(config, "num_attention_heads", path)
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or _positive(config, "hidden_size", path) // heads
    if not (isinstance(kv_heads, int) and isinstance(head_size, int)):
        raise InvalidError(f"{path}: num_key_value_heads and head_dim must be numbers")
    return 2 * kv_heads * head_size


def _positive(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise InvalidError(
            f"{path}: {name} is {value!r}, a number of 1 or more expected: not the config of a model "
            "with attention"
        )
    return value
