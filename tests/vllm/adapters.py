"""Adapters for tests: made on disk, and loaded into a running engine."""

import json
from pathlib import Path
from typing import Any


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


def add(llm: Any, *, lora: dict[str, Any], inplace: bool = False) -> bool:
    """Load an adapter into an engine, as `/v1/load_lora_adapter` and `--lora-modules` do."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora["name"], lora["id"], lora["path"], load_inplace=inplace)
    return bool(llm.llm_engine.add_lora(request))


def call_workers(llm: Any, *, method: str) -> int:
    """Call a method of the workers; returns how many answered."""
    return len(llm.collective_rpc(method))
