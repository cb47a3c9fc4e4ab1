"""Engines with a root below them: what the tests of the connector share.

    place = Place(root=..., cache=..., start=start_engine)
    with place.engine(model) as engine:
        answers = engine.generate(PROMPTS)
        place.await_blobs(19)

A `Place` is one machine's view of one root: the root, and the user's cache with its index. Two places
on one root are two machines. What is observed comes from outside the code under test: files in the
root, the engine's metrics page, /proc.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixstore.blob.header import HEADER_BYTES, BlobHeader, decode_header
from tests.vllm import models
from tests.vllm.engine import Engine, Generation

if TYPE_CHECKING:
    from tests.vllm.conftest import StartEngine

BLOCK_TOKENS = 128
"""The CPU backend's block; one chunk unless a test says otherwise."""
TINY_CHUNK_BYTES = 4 * 2 * 2 * 64 * 4 * BLOCK_TOKENS
"""One chunk of the tiny Llama in float32: layers, keys and values, heads, head size, element."""
CPU_BYTES = 64 * 2**20
PATIENCE_S = 30.0
FLOAT32: Mapping[str, Any] = {"dtype": "float32"}


def tokens(seed: int, count: int) -> tuple[int, ...]:
    """Draw a prompt: the same for a seed in every process."""
    draw = random.Random(seed)
    return tuple(draw.randrange(100, models.VOCAB_SIZE) for _ in range(count))


LONG = tokens(1, 1692)
"""13 chunks and a tail."""
FORKED = (*LONG[:896], *tokens(2, 420))
"""The first 7 chunks of LONG, then 3 of its own and a tail."""
OTHER = tokens(3, 500)
"""3 chunks and a tail, of nothing else."""
PROMPTS = (LONG, FORKED, OTHER)
PROMPT_CHUNKS = (13, 10, 3)
CHUNKS = 19
"""Different chunks in all of them."""


def cached_chunks(answers: Sequence[Generation]) -> list[int]:
    """Return how many chunks of each prompt were not computed."""
    return [answer.cached_tokens // BLOCK_TOKENS for answer in answers]


def outputs(answers: Sequence[Generation]) -> list[tuple[int, ...]]:
    """Return the generated tokens of each answer."""
    return [answer.token_ids for answer in answers]


def logprobs(answers: Sequence[Generation]) -> list[tuple[float, ...] | None]:
    """Return the logprobs of each answer's tokens."""
    return [answer.logprobs for answer in answers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the engine alone answers: computed, and from its own prefix cache."""

    cold: list[Generation]
    own_hit: list[Generation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One machine's view of one root."""

    root: Path
    cache: Path
    start: "StartEngine"
    options: Mapping[str, Any] = field(default_factory=dict)

    def engine(
        self,
        model: Path,
        *,
        options: Mapping[str, Any] | None = None,
        llm: Mapping[str, Any] = FLOAT32,
        env: Mapping[str, str] | None = None,
        state: str | None = "on",
        **fields: Any,
    ) -> Engine:
        """Start an engine on the root and wait until its store is in a state; None: do not wait."""
        engine = self.start(
            model,
            llm={**llm, "kv_transfer_config": self.transfer({**self.options, **(options or {})})},
            env={"XDG_CACHE_HOME": str(self.cache), **(env or {})},
            **fields,
        )
        try:
            if state is not None:
                await_state(engine, state)
        except BaseException:
            engine.kill()
            raise
        return engine

    def transfer(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the engine's `kv_transfer_config` for options of the front door."""
        return {
            "kv_connector": "PrefixStoreConnector",
            "kv_connector_module_path": "prefixstore.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                name: value
                for name, value in {
                    "root": str(self.root),
                    "cpu_bytes_to_use": CPU_BYTES,
                    **options,
                }.items()
                if value is not None
            },
        }

    def blobs(self) -> dict[str, Path]:
        """Return the published blobs by the hex of their key."""
        return {path.stem: path for path in self.root.glob("ns/*/*/*/*.kv")}

    def quarantined(self) -> list[Path]:
        """Return what lies in quarantine."""
        return sorted(path for path in self.root.glob("quarantine/**/*") if path.is_file())

    def await_blobs(self, count: int) -> dict[str, Path]:
        """Wait until so many blobs are published, and no more."""
        until(lambda: len(self.blobs()) >= count, f"{count} blobs, {len(self.blobs())} seen")
        blobs = self.blobs()
        assert len(blobs) == count
        return blobs


def header_of(blob: Path) -> BlobHeader:
    """Read one blob's header."""
    with blob.open("rb") as file:
        return decode_header(file.read(HEADER_BYTES))


def chunks_by_group(blobs: Iterable[Path]) -> tuple[int, ...]:
    """Return how many chunks each KV group has, fewest first."""
    return tuple(sorted(Counter(blob.stem[-8:] for blob in blobs).values()))


def until(condition: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition; `what` names it when it does not come true."""
    end_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.05)


def await_state(engine: Engine, state: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until the store of an engine is in a state.

    Metrics move only while an engine steps, and one without requests does not: it is given some of
    a token, too short for a chunk.
    """

    def reached() -> bool:
        engine.generate([[5]], max_tokens=2)
        return state_of(engine) == state

    until(reached, f"state {state}", patience_s=patience_s)


def state_of(engine: Engine) -> str | None:
    """Return the state that the metrics tell."""
    states = labelled(engine, "vllm:prefixstore_state", "state")
    return next((state for state, value in states.items() if value), None)


def labelled(engine: Engine, name: str, label: str) -> dict[str, float]:
    """Return a metric's values by one of its labels."""
    values: dict[str, float] = {}
    for line, value in engine.metrics().items():
        metric, _, rest = line.partition("{")
        if metric != name:
            continue
        labels = dict(part.split("=", 1) for part in rest.rstrip("}").split(",") if "=" in part)
        values[labels[label]] = values.get(labels[label], 0) + value
    return {key: value for key, value in values.items() if value}


# Processes, by what the kernel says of them.


def io_processes(engine: Engine) -> list[int]:
    """Return the I/O processes of a running engine."""
    return [
        pid
        for pid in _processes()
        if b"prefixstore.ioproc.server" in _read(pid, "cmdline")
        and (parent := _parent(pid)) is not None
        and _is_of(parent, engine)
    ]


def await_io_process(engine: Engine, *, other_than: int | None = None) -> int:
    """Wait until an engine has an I/O process that answers for itself, and return it."""
    found: list[int] = []

    def started() -> bool:
        found[:] = [pid for pid in io_processes(engine) if pid != other_than]
        return bool(found)

    until(started, "an I/O process")
    return found[0]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return _read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"], [b"X"])


def kill(pid: int) -> None:
    """SIGKILL one process."""
    os.kill(pid, signal.SIGKILL)


def shared_regions(engine: Engine) -> set[Path]:
    """Return the names of vLLM's CPU tier that processes of an engine have mapped, linked or not."""
    return {
        Path(line.split()[5].decode())
        for pid in _processes()
        if _is_of(pid, engine)
        for line in _read(pid, "maps").splitlines()
        if b"/dev/shm/vllm_offload_" in line
    }


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int | None:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _is_of(pid: int, engine: Engine) -> bool:
    """Whether a process belongs to the session of an engine."""
    try:
        return os.getsid(pid) == engine.pid
    except OSError:
        return False
