"""Models that the engine tests run: SmolLM2-135M for truth, tiny random ones for breadth.

Each tiny model has four layers of width 256 and SmolLM2's tokenizer. Its weights are drawn with a
standard deviation of 0.08 and its output layer is not its embedding, so that each token's choice
depends on the whole context: with the usual 0.02, or with tied weights, a random model repeats one
token whatever the KV holds, and a test would prove nothing. Prompts must vary too: one token
repeated gives one token repeated.

Directories live under `.cache/models`, are made once, and appear whole (a temporary sibling, then
a rename). Building one imports torch and transformers, so it happens in a child process: this file
run as a script. The name of a directory holds a digest of this file, so an edited recipe is never
served from an old directory.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
MODELS_DIR = REPO / ".cache" / "models"
SMOLLM2 = MODELS_DIR / "smollm2-135m"
# Read at import, so that editing the file while tests run changes nothing half-way.
RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
BUILD_TIMEOUT_S = 300

VOCAB_SIZE = 49152  # SmolLM2's tokenizer
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def llama() -> Any:
    """Grouped-query full attention: one KV group."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=512, tie_word_embeddings=False))


def mistral() -> Any:
    """A sliding window of 256 tokens on every layer: one group that keeps only its tail."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            **COMMON, intermediate_size=512, tie_word_embeddings=False, sliding_window=256
        )
    )


def gemma3() -> Any:
    """Three sliding-window layers to one full: four KV groups in vLLM."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention"] * 3 + ["full_attention"]
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            intermediate_size=512,
            sliding_window=256,
            layer_types=layers,
            query_pre_attn_scalar=64,
        )
    )
    # vLLM insists on tied weights here. A small embedding leaves the stream to the layers.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.03)
    return model


def gpt_oss() -> Any:
    """Window and full attention in turn, sinks, a mixture of experts: two KV groups."""
    from transformers import GptOssConfig, GptOssForCausalLM

    layers = ["sliding_attention", "full_attention"] * 2
    return GptOssForCausalLM(
        GptOssConfig(
            **COMMON,
            intermediate_size=256,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=layers,
        )
    )


def phi3() -> Any:
    """Full attention whose RoPE has factors for short and for long contexts; the engine's limit chooses."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 32,
        "long_factor": [4.0] * 32,
        "original_max_position_embeddings": 2048,
    }
    return Phi3ForCausalLM(
        Phi3Config(
            **{key: value for key, value in COMMON.items() if key != "head_dim"},
            intermediate_size=512,
            tie_word_embeddings=False,
            original_max_position_embeddings=2048,
            rope_parameters=rope,
        )
    )


def mixtral() -> Any:
    """Full attention, a mixture of experts after each layer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            intermediate_size=256,
            tie_word_embeddings=False,
            sliding_window=None,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def deepseek_v2() -> Any:
    """Multi-head latent attention: one compressed vector a token instead of keys and values."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    shape = {key: value for key, value in COMMON.items() if key != "head_dim"}
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **{**shape, "num_key_value_heads": 4},
            intermediate_size=512,
            moe_intermediate_size=128,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            tie_word_embeddings=False,
        )
    )


def qwen3_next() -> Any:
    """Three layers of gated delta rule to one of full attention: states and blocks."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            # Keys and values as large as a state, or vLLM makes blocks of many hundred tokens.
            **{**COMMON, "num_key_value_heads": 4, "head_dim": 128},
            intermediate_size=256,
            tie_word_embeddings=False,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
        )
    )


def whisper() -> Any:
    """An encoder for sound and a decoder that looks at it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB_SIZE,
            d_model=256,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=512,
            decoder_ffn_dim=512,
            init_std=0.08,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            decoder_start_token_id=1,
        )
    )


RECIPES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt-oss": gpt_oss,
    "phi3": phi3,
    "mixtral": mixtral,
    "deepseek-v2": deepseek_v2,
    "qwen3-next": qwen3_next,
    "whisper": whisper,
}


def tiny(name: str, *, seed: int = 0) -> Path:
    """Return the directory of a tiny model, made now if need be.

    Args:
        name: one of `RECIPES`.
        seed: other weights in the same shape.
    """
    target = MODELS_DIR / f"tiny-{name}-{seed}-{RECIPE}"
    if (target / "config.json").is_file():
        return target
    for old in MODELS_DIR.glob(f"tiny-{name}-{seed}-*"):
        shutil.rmtree(old, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-P", __file__, name, str(seed), str(target)],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"building tiny model {name} failed:\n{done.stderr[-4000:]}")
    return target


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, which `tools/model` makes."""
    if not (SMOLLM2 / "config.json").is_file():
        raise RuntimeError(f"{SMOLLM2} is missing: run tools/model")
    return SMOLLM2


def fast_dtype() -> str:
    """Return the element type in which this machine computes fastest.

    bfloat16 where the CPU multiplies it in hardware; elsewhere oneDNN emulates it, several times
    slower than float32.
    """
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def build(name: str, seed: int, target: Path) -> None:
    """Write one tiny model to `target`; the child process's whole work."""
    import torch

    torch.manual_seed(seed)
    model = RECIPES[name]().to(torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        whole = Path(scratch) / "model"
        model.save_pretrained(whole)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(smollm2() / file, whole / file)
        whole.rename(target)


if __name__ == "__main__":
    build(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
