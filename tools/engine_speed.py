"""Measure what the engine tests wait for: engine starts and SmolLM2's prefill, by mode and dtype.

Run `tools/model` once, then `.venv/bin/python tools/engine_speed.py`; `docs/testing.md` cites it. No
store is involved: this is the machine and vLLM alone, the ground under every figure of ours.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tests.vllm.engine import Engine, EngineConfig, ForkServer, fork_server  # noqa: E402
from tests.vllm.models import VOCAB_SIZE, smollm2  # noqa: E402

PROMPT_TOKENS = 1484
DECODED_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to run the engine."""

    mode: str
    binding: str
    env: dict[str, str] = field(default_factory=dict)
    multiprocess: bool = False
    forked: bool = False


CASES = (
    Case(mode="in-process, forked", binding="all cores", forked=True),
    Case(mode="in-process, fresh", binding="all cores"),
    Case(mode="engine process", binding="RESERVED_CPU=0", multiprocess=True),
    Case(
        mode="engine process",
        binding="vLLM's default",
        env={"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"},
        multiprocess=True,
    ),
    Case(
        mode="engine process",
        binding="THREADS_BIND=0-1",
        env={"VLLM_CPU_OMP_THREADS_BIND": "0-1"},
        multiprocess=True,
    ),
)


def measure(case: Case, dtype: str, *, server: ForkServer, log: Path) -> list[str]:
    """Return one row: start, first and later cold prompts, a cached one, a decoded token."""
    draw = random.Random(0)  # noqa: S311 - any text will do, the same each time
    prompt = [draw.randrange(100, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
    config = EngineConfig(
        model=smollm2(), llm={"dtype": dtype}, env=case.env, multiprocess=case.multiprocess
    )
    started_s = time.perf_counter()
    with Engine.start(config, log=log, server=server if case.forked else None) as engine:
        start_s = time.perf_counter() - started_s
        cold_s = []
        for _ in range(4):
            cold_s.append(engine.generate([prompt], max_tokens=1)[0].ttft_s)
            engine.reset_prefix_cache()
        engine.generate([prompt], max_tokens=1)
        warm = engine.generate([prompt], max_tokens=1 + DECODED_TOKENS)[0]
    decode_s = (warm.total_s - warm.ttft_s) / DECODED_TOKENS
    return [
        case.mode,
        case.binding,
        dtype,
        f"{start_s:.1f}",
        f"{cold_s[0]:.2f}",
        f"{statistics.median(cold_s[1:]):.2f}",
        f"{warm.ttft_s:.2f}",
        f"{decode_s * 1000:.0f}",
    ]


def machine() -> str:
    """Describe the processor in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    return f"{os.cpu_count()} x {model} ({', '.join(wide)}), load {os.getloadavg()[0]:.1f}"


def main() -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"])
    parser.add_argument("--mode", help="only cases whose mode or binding holds this text")
    args = parser.parse_args()
    cases = [case for case in CASES if (args.mode or "") in f"{case.mode} {case.binding}"]
    print(f"{machine()}; {PROMPT_TOKENS} tokens; seconds, decode in ms a token\n")
    print("| mode | cores | dtype | start | first prompt | next (median of 3) | cached | decode |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as logs, fork_server(log=Path(logs) / "forks") as server:
        server.wait_until_ready()
        for case in cases:
            for dtype in args.dtype or ["bfloat16", "float32"]:
                row = measure(case, dtype, server=server, log=Path(logs) / "engine")
                print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
