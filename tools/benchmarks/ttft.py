"""Time to first token on real vLLM: computed, from the store after a SIGKILL, and from the engine's own memory.

One engine computes and stores a set of prompts, and is killed with SIGKILL. The next one, on the same root,
is asked each prompt twice in a row: the first answer comes from the store, the second from the memory of that
same engine, where the first has put it. Each pair is compared with itself, so that a machine that gets busy
in between changes both. Random tokens of SmolLM2's vocabulary: what they say does not matter to a cache.
"""

import argparse
import random
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report, Table, add_report_options, describe_machine
from tests.vllm.engine import Engine, EngineConfig, Generation
from tests.vllm.models import VOCAB_SIZE, smollm2
from tests.vllm.stores import BLOCK_TOKENS, Place

WARM_UP = 2
"""Prompts that are asked first and not counted: an engine's first requests pay for more than themselves."""
CPU_BYTES = 400_000_000
WANTED_OF_OWN = 1.25
WANTED_OF_COLD = 8.0


def prompts(count: int, length: int) -> list[list[int]]:
    """Draw prompts, the same each time."""
    draw = random.Random(0)  # noqa: S311 - any text will do
    return [[draw.randrange(100, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


class Bench:
    """Engines on one root, in a directory of their own."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory = directory
        self._options = options
        self.place = Place(
            root=directory / "root",
            cache=directory / "cache",
            start=self._start,
            options={"cpu_bytes_to_use": CPU_BYTES},
        )

    def cold(self, asked: Sequence[Sequence[int]]) -> list[Generation]:
        """Compute and store all prompts, then kill the engine."""
        engine = self._engine()
        try:
            answers = [engine.generate([prompt], max_tokens=2)[0] for prompt in asked]
            chunks = sum(len(prompt) // BLOCK_TOKENS for prompt in asked)
            self.place.await_blobs(chunks)
        finally:
            engine.kill()
        return answers

    def warm(self, asked: Sequence[Sequence[int]]) -> list[tuple[Generation, Generation]]:
        """Answer each prompt from the store, then from the engine's own memory."""
        with self._engine() as engine:
            return [
                (
                    engine.generate([prompt], max_tokens=2)[0],
                    engine.generate([prompt], max_tokens=2)[0],
                )
                for prompt in asked
            ]

    def _engine(self) -> Engine:
        return self.place.engine(
            self._options.model or smollm2(),
            llm={"dtype": self._options.dtype},
            multiprocess=not self._options.in_process,
        )

    def _start(self, model: Path, *, llm: Mapping[str, Any], **fields: Any) -> Engine:
        config = EngineConfig(model=model, llm=llm, **fields)
        return Engine.start(config, log=self._directory / "engine.log")


def check(cold: Sequence[Generation], warm: Sequence[tuple[Generation, Generation]]) -> None:
    """Refuse to report times of something else than what the tables say."""
    # Token for token as the engine's own prefix hit: computing whole prompts rounds otherwise in bfloat16.
    for computed, (stored, own) in zip(cold, warm, strict=True):
        if computed.cached_tokens or stored.cached_tokens != own.cached_tokens:
            raise SystemExit(
                f"bench ttft: cached tokens were {computed.cached_tokens} when computed, "
                f"{stored.cached_tokens} from the store, {own.cached_tokens} from memory: expected "
                "0, and the last two alike"
            )
        if stored.token_ids != own.token_ids:
            raise SystemExit("bench ttft: the store led to other tokens than own memory did")


def tabulate(cold: Sequence[Generation], warm: Sequence[tuple[Generation, Generation]]) -> Table:
    """Compare medians, and each prompt with itself."""
    times_s = {
        "computed": [computed.ttft_s for computed in cold],
        "from the store": [stored.ttft_s for stored, _ in warm],
        "own memory": [own.ttft_s for _, own in warm],
    }
    stored_s = times_s["from the store"]
    rows = []
    for name, taken_s in times_s.items():
        ratios = [of / s for of, s in zip(taken_s, stored_s, strict=True)]
        rows.append(
            (
                name,
                f"{statistics.median(taken_s):.3f}",
                f"{min(taken_s):.3f}-{max(taken_s):.3f}",
                f"{statistics.median(ratios):.2f}",
            )
        )
    return Table(
        title=f"time to first token, {len(cold)} prompts",
        columns=("answered", "median s", "lowest-highest", "times the store's"),
        rows=rows,
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench ttft", description=__doc__)
    add_report_options(parser)
    parser.add_argument("--model", type=Path, help="a model's directory (SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="float32", help="vLLM's --dtype (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1500, help="of each prompt (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="that count (%(default)s)")
    parser.add_argument(
        "--in-process", action="store_true", help="run the engine without a process of its own"
    )
    options = parser.parse_args()
    report = Report(about=__doc__, machine=describe_machine(options.directory))
    directory = Path(tempfile.mkdtemp(prefix="bench-ttft-", dir=options.directory))
    try:
        bench = Bench(directory, options)
        asked = prompts(options.prompts + WARM_UP, options.tokens)
        cold = bench.cold(asked)[WARM_UP:]
        warm = bench.warm(asked)[WARM_UP:]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    check(cold, warm)
    report.tables.append(tabulate(cold, warm))
    report.measurements = [
        {"cold_s": computed.ttft_s, "store_s": stored.ttft_s, "own_s": own.ttft_s}
        for computed, (stored, own) in zip(cold, warm, strict=True)
    ]
    ratio_own = statistics.median(m["store_s"] / m["own_s"] for m in report.measurements)
    ratio_cold = statistics.median(m["cold_s"] / m["store_s"] for m in report.measurements)
    report.notes += [
        f"{options.tokens} tokens a prompt, {warm[0][0].cached_tokens} of them cached, {options.dtype}.",
        (
            f"From the store: {ratio_own:.2f} times own memory's time (wanted: {WANTED_OF_OWN} or "
            f"less), {ratio_cold:.1f} times faster than computed (wanted: {WANTED_OF_COLD:.0f} or more)."
        ),
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
