"""How much room prompts take follows from a model's config and from the blob's format."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefixstore.errors import InvalidError
from prefixstore.ops.sizing import read_kv_shape, size_prompts
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, chunk_at

# 30 layers, 3 KV heads of 64: SmolLM2-135M.
SMALL = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "dtype": "bfloat16",
}
LATENT = {**SMALL, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
WINDOWED = {**SMALL, "layer_types": ["sliding_attention", "full_attention"] * 15}
MISTRAL = {**SMALL, "sliding_window": 4096}
HYBRID = {**SMALL, "layer_types": ["linear_attention", "full_attention"] * 15}
NESTED = {"text_config": SMALL, "vision_config": {"num_hidden_layers": 99}}


def shape_of(tmp_path: Path, config: dict[str, Any]) -> Any:
    """Read a config as a model's directory has it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_kv_shape(tmp_path)


@pytest.mark.parametrize(
    ("config", "token_bytes", "windowed"),
    [
        pytest.param(SMALL, 30 * 2 * 3 * 64 * 2, 0, id="grouped heads"),
        pytest.param({**SMALL, "head_dim": 128}, 30 * 2 * 3 * 128 * 2, 0, id="head_dim"),
        pytest.param(LATENT, 30 * (512 + 64) * 2, 0, id="latent attention"),
        pytest.param(WINDOWED, 30 * 2 * 3 * 64 * 2, 15, id="some windowed layers"),
        pytest.param(MISTRAL, 30 * 2 * 3 * 64 * 2, 30, id="all windowed"),
        pytest.param(NESTED, 30 * 2 * 3 * 64 * 2, 0, id="text part of several"),
    ],
)
def test_a_token_takes_what_its_layers_keep(
    tmp_path: Path, config: dict[str, Any], token_bytes: int, windowed: int
) -> None:
    """Keys and values of every layer, or one latent vector."""
    shape = shape_of(tmp_path, config)

    assert shape.token_bytes("bfloat16") == token_bytes
    assert shape.windowed_layers == windowed
    assert shape.dtype == "bfloat16"


def test_the_files_are_as_large_as_those_of_a_store(tmp_path: Path) -> None:
    """What is worked out for prompts that share a beginning is what a root then holds."""
    found = size_prompts(
        shape_of(tmp_path, SMALL),
        dtype="float16",
        prompts=3,
        tokens=16 * 5 + 7,
        shared_tokens=16 * 2 + 9,
    )
    root = f"{tmp_path}/root"
    with PrefixStore.open(root, namespace=FIELDS, index=None, background=False) as store:
        for name in "abc":
            keys = [*chain("shared", 2), *chain(name, 3)]
            for at in range(len(keys)):
                store.store(chunk_at(keys, at), bytes(found.chunk_bytes))
        held = store.stats()

    assert (found.chunks, found.file_bytes) == (held.chunks, held.file_bytes)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        pytest.param(HYBRID, "15 layers keep a state", id="states"),
        pytest.param({"architectures": ["X"]}, "num_hidden_layers is None", id="no attention"),
        pytest.param({**SMALL, "num_attention_heads": "9"}, "a number of 1 or more", id="text"),
        pytest.param({**SMALL, "kv_lora_rank": 512}, "qk_rope_head_dim", id="half a latent"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    """No guess where a config does not say how much is kept."""
    with pytest.raises(InvalidError, match=says):
        shape_of(tmp_path, config)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", None])
def test_a_path_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    """The message names the file, and what was expected of it."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidError, match=r"config\.json"):
        read_kv_shape(tmp_path)


def test_more_shared_than_there_is_is_refused(tmp_path: Path) -> None:
    """Numbers that contradict each other are no question."""
    with pytest.raises(InvalidError, match="do not fit"):
        size_prompts(
            shape_of(tmp_path, SMALL), dtype="float16", prompts=1, tokens=10, shared_tokens=11
        )
