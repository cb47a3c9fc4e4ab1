"""What the store does where an engine's weights are more, or become other, than its namespace says."""

import json
from pathlib import Path

import pytest

from tests.vllm import stores
from tests.vllm.stores import FLOAT32, LONG, Place, Reference


def count_blobs(place: Place) -> int:
    """Count blobs of all namespaces: keys of the same tokens are the same in each."""
    return len(list(place.root.glob("ns/*/*/*/*.kv")))


def make_adapter(directory: Path, *, seed: int) -> Path:
    """Write a LoRA adapter for the tiny Llama: rank 8 on the value projections."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {}
    for layer in range(4):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, 256) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 8) * 0.1
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.filterwarnings("default")  # What torch says while it is imported here is not ours.
def test_adapters_pass_the_store_by_and_a_reset_turns_it_off(
    filled: Place, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """Nothing of an adapter's is stored, while the base model hits.

    After the reset that follows a weight update nothing is loaded or stored any more.
    """
    llm = {**FLOAT32, "enable_lora": True, "max_lora_rank": 8}
    with filled.engine(tiny_llama, llm=llm) as engine:
        path = make_adapter(tmp_path / "adapter", seed=1)
        adapter = {"name": "adapter", "id": 1, "path": str(path)}
        (adapted,) = engine.generate([LONG], lora=adapter)
        (base,) = engine.generate([LONG])
        assert engine.reset_prefix_cache(reset_connector=True)
        after = engine.generate([LONG, stores.tokens(400, 300)])
        state = stores.state_of(engine)
        assert "Restart the engine" in engine.log_text

    assert [0, 13] == stores.cached_chunks([adapted, base])
    assert base.token_ids != adapted.token_ids
    assert alone.cold[0].token_ids == base.token_ids == after[0].token_ids
    assert [0, 0] == stores.cached_chunks(after)
    assert "off" == state
    assert stores.CHUNKS == count_blobs(filled)
