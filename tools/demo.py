"""The main job, shown on real vLLM: a prompt is computed once, and every later engine answers from disk.

Three servers, each started as a user would start it, answer the same long prompt: a cold one (asked
twice, to see what its own memory is worth), one that starts after the first was killed with SIGKILL, and a
replica that runs beside the second on the same root. Exits with 1 if any of what it claims is not so.

What it prints comes from outside the engine: time to first token from the stream that a client sees,
tokens and bytes from the server's own usage report and /metrics, file sizes from the root.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

REPO = Path(__file__).resolve().parents[1]
START_S = 240.0
STORED_S = 30.0
ANSWER_TOKENS = 32
CHUNK_TOKENS_OF_PROMPT = 0.9
"""How much of the prompt must come from the store when warm: all but the last, unfinished chunk."""

console = Console()


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request."""

    first_token_s: float
    text: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    name: str
    answer: Answer
    read_bytes: int
    stored_bytes: int


class Server:
    """A server in a process group of its own."""

    def __init__(self, model: Path, root: Path, log: Path, options: argparse.Namespace) -> None:
        self.port = _free_port()
        self._log = log
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
        }
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("prefixstore")),
                    "serve",
                    str(model),
                    "--root",
                    str(root),
                    "--option",
                    "cpu_bytes_to_use=400000000",
                    "--",
                    "--port",
                    str(self.port),
                    "--host",
                    "127.0.0.1",
                    "--served-model-name",
                    "demo",
                    "--max-model-len",
                    "4096",
                    "--dtype",
                    options.dtype,
                    "--enforce-eager",
                    "--enable-prompt-tokens-details",
                ],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers, or say why it does not."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError):
                if "store is on" in self._log.read_text(errors="replace"):
                    urllib.request.urlopen(self._url("/health"), timeout=2)  # noqa: S310
                    return
            time.sleep(0.5)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"the server did not come up; the end of its log:\n{tail}")

    def ask(self, prompt: str) -> Answer:
        """Send one prompt and time the stream."""
        client = OpenAI(base_url=self._url("/v1"), api_key="none", timeout=300, max_retries=0)
        started_s = time.perf_counter()
        first_token_s, text, usage = 0.0, "", None
        for event in client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=ANSWER_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if event.choices and not first_token_s:
                first_token_s = time.perf_counter() - started_s
            text += "".join(choice.text for choice in event.choices)
            usage = event.usage or usage
        assert usage is not None, "asked for it"
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details else 0
        return Answer(first_token_s, text, usage.prompt_tokens, cached)

    def metric(self, name: str) -> float:
        """Return the sum of one of the server's counters over its labels."""
        with urllib.request.urlopen(self._url("/metrics"), timeout=5) as page:  # noqa: S310
            lines = page.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}_total{{", f"{name}{{"))
        )

    def kill(self) -> None:
        """SIGKILL the server and all its processes, as a crash or an out-of-memory kill does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a model's directory")
    parser.add_argument("--root", type=Path, help="keep the root here; must be new or empty")
    parser.add_argument("--dtype", default="float32", help="vLLM's --dtype; default: %(default)s")
    parser.add_argument("--prompt-characters", type=int, default=6000, help="of a real text")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, too")
    options = parser.parse_args()
    with _workplace(options.root) as (root, logs):
        rows = _run(options, root, logs)
        _print(rows)
        if options.json:
            print(json.dumps([{"name": row.name, **vars(row.answer)} for row in rows]))
        problems = _problems(rows)
    for problem in problems:
        console.print(f"[bold red]not so:[/] {problem}")
    if problems:
        raise SystemExit(1)
    console.print("[bold green]The prompt was computed once.[/]")


def _run(options: argparse.Namespace, root: Path, logs: Path) -> list[Row]:
    prompt = _prompt(options.prompt_characters)
    servers: list[Server] = []
    rows: list[Row] = []
    try:
        for name, log in (
            ("cold", "cold.log"),
            ("restarted", "restarted.log"),
            ("replica", "replica.log"),
        ):
            with console.status(f"{name}: starting vLLM (half a minute)"):
                server = Server(options.model, root, logs / log, options)
                servers.append(server)
                server.wait_until_ready()
            server.ask("Hello.")  # A process's first request pays for more than itself.
            before = _blob_bytes(root)
            with console.status(f"{name}: answering"):
                answer = server.ask(prompt)
                _await_stores(server)
            read = int(server.metric("vllm:kv_offload_tiering_read_bytes"))
            rows.append(Row(name, answer, read, _blob_bytes(root) - before))
            console.print(f"{name}: first token after {answer.first_token_s:.2f} s")
            if len(servers) == 1:
                again = server.ask(prompt)
                rows.append(Row("own memory", again, 0, 0))
                server.kill()
                console.print("that engine is killed with SIGKILL")
    finally:
        for server in servers:
            server.kill()
    return rows


def _await_stores(server: Server) -> None:
    """Wait until the engine has no store in flight, so that the bytes can be told."""
    end_s = time.monotonic() + STORED_S
    time.sleep(1.0)
    while time.monotonic() < end_s:
        if not server.metric("vllm:kv_offload_tiering_active_cascade_jobs"):
            return
        time.sleep(0.2)


def _problems(rows: list[Row]) -> list[str]:
    cold, _, *warm = rows
    problems = []
    if cold.answer.cached_tokens:
        problems.append(f"the cold engine found {cold.answer.cached_tokens} tokens in a new root")
    if not cold.stored_bytes:
        problems.append("the cold engine stored nothing")
    for row in warm:
        if row.answer.cached_tokens < CHUNK_TOKENS_OF_PROMPT * row.answer.prompt_tokens:
            problems.append(
                f"{row.name}: only {row.answer.cached_tokens} of {row.answer.prompt_tokens} prompt "
                "tokens came from the store"
            )
        if row.answer.text != cold.answer.text:
            problems.append(f"{row.name}: another text than the cold engine's")
        if not row.read_bytes:
            problems.append(f"{row.name}: nothing was read from the root")
        if row.answer.first_token_s >= cold.answer.first_token_s:
            problems.append(f"{row.name}: not faster than cold")
    return problems


def _print(rows: list[Row]) -> None:
    cold = rows[0].answer
    table = Table(
        title=f"one prompt of {cold.prompt_tokens} tokens, three engines, one root",
        title_justify="left",
    )
    for column in ("engine", "first token", "faster", "cached tokens", "read", "stored"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    table.add_column("same text", justify="center")
    for row in rows:
        answer = row.answer
        table.add_row(
            row.name,
            f"{answer.first_token_s:.2f} s",
            f"{cold.first_token_s / answer.first_token_s:.1f}x",
            str(answer.cached_tokens),
            f"{row.read_bytes / 1e6:.1f} MB",
            f"{row.stored_bytes / 1e6:.1f} MB",
            "yes" if answer.text == cold.text else "NO",
        )
    console.print(table)
    console.print(
        "cold: computed. own memory: the same engine, asked again. restarted: a new engine,\n"
        "after a SIGKILL of the first. replica: one more engine beside it, on the same root.",
        highlight=False,
    )


def _prompt(characters: int) -> str:
    """Return a real text of about that length, with a question at its end."""
    text = ""
    for name in ("docs/architecture.md", "docs/format.md", "docs/operating.md", "README.md"):
        with contextlib.suppress(FileNotFoundError):
            text += (REPO / name).read_text()
    return text[:characters] + "\n\nIn one sentence, what is this text about?\n"


def _blob_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("ns/*/*/*/*.kv"))


@contextlib.contextmanager
def _workplace(root: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yield a root and a directory for logs; remove what is ours unless the run failed."""
    directory = Path(tempfile.mkdtemp(prefix="prefixstore-demo-"))
    try:
        yield (root.resolve() if root else directory / "root"), directory
    except BaseException:
        console.print(f"logs: {directory}")
        raise
    shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
