"""Real vLLM engines for tests: each in an operating system process of its own.

    config = EngineConfig(model=path, llm={"dtype": "float32"})
    with Engine.start(config, log=tmp_path / "engine.log") as engine:
        (answer,) = engine.generate(["Once upon a time"], max_tokens=8)

Owns the processes, their environment and their logs. Knows nothing of prefixstore: a connector is
whatever the caller puts into `llm["kv_transfer_config"]`. The other end of the socket, the only
part that imports vLLM, is `tests/vllm/engine_child.py`.

Without `multiprocess` scheduler, worker and front end share one process (vLLM's in-process mode),
which starts in a few seconds when forked from a `ForkServer`. With it, EngineCore and workers are
processes of their own, as under `vllm serve`; all of them share the child's session, so `kill()`
reaches every one at once, as a pod's end does.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHILD = Path(__file__).with_name("engine_child.py")
REPO = Path(__file__).resolve().parents[2]

# A start takes 5-40 s on two cores; ten times that is a hang, not a slow machine.
START_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 240.0
QUIT_TIMEOUT_S = 60.0
LOG_TAIL_BYTES = 8000

DEFAULT_ENV: Mapping[str, str] = {
    # vLLM refuses to guess how much memory the KV cache may take; 1 GiB holds any test.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM keeps one core out of the computation for its front end; on two cores that is half.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

DEFAULT_LLM: Mapping[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "max_model_len": 4096,
    "disable_log_stats": False,
    "seed": 0,
}

Prompt = str | Sequence[int] | Mapping[str, Any]


class EngineError(AssertionError):
    """The engine died, hung, or reported an exception; the message carries its log's tail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine is started with."""

    model: Path
    llm: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    multiprocess: bool = False

    def llm_fields(self) -> dict[str, Any]:
        """Return the keyword arguments of `vllm.LLM`."""
        return {**DEFAULT_LLM, "model": str(self.model), **self.llm}

    def child_env(self) -> dict[str, str]:
        """Return what is set on top of the environment that the child inherits."""
        return {
            **DEFAULT_ENV,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if self.multiprocess else "0",
            **self.env,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One finished request."""

    token_ids: tuple[int, ...]
    text: str
    # Of each generated token; None unless asked for.
    logprobs: tuple[float, ...] | None
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    ttft_s: float
    total_s: float


class ForkServer:
    """A process that has imported vLLM and forks one engine a request.

    Used by one thread. Close it last: the kernel kills its engines with it.
    """

    def __init__(self, *, log: Path) -> None:
        """Start importing in the background; the first `fork` waits for its end."""
        self._log = log
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with log.open("wb") as sink:
            self._process = _spawn("fork-server", theirs, env=DEFAULT_ENV, sink=sink)
        theirs.close()
        self._ready = False
        self._forked: list[int] = []
        self._ended: dict[int, int] = {}

    def wait_until_ready(self) -> None:
        """Return once vLLM is imported and a fork costs no more than the engine's own start."""
        self._pump_until(lambda: self._ready, timeout_s=START_TIMEOUT_S)

    def fork(self, *, env: Mapping[str, str], sock: socket.socket, log_fd: int) -> int:
        """Return the pid of a new engine that reads its start from `sock`."""
        self.wait_until_ready()
        request = json.dumps({"env": dict(env)}).encode()
        socket.send_fds(self._control, [request], [sock.fileno(), log_fd])
        self._pump_until(lambda: bool(self._forked), timeout_s=COMMAND_TIMEOUT_S)
        return self._forked.pop()

    def wait(self, pid: int, *, timeout_s: float) -> int:
        """Return the exit code of engine `pid`, negative for a signal.

        Raises:
            TimeoutError: it still runs.
        """
        self._pump_until(lambda: pid in self._ended, timeout_s=timeout_s)
        return self._ended[pid]

    def close(self) -> None:
        """End the server and every engine it still has."""
        self._control.close()
        _end(self._process, timeout_s=QUIT_TIMEOUT_S)

    def _pump_until(self, condition: Any, *, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._control], [], [], left_s)[0]:
                raise TimeoutError(f"fork server: no answer in {timeout_s:.0f} s")
            message = json.loads(self._control.recv(1 << 16) or b"{}")
            match message:
                case {"ready": True}:
                    self._ready = True
                case {"forked": pid}:
                    self._forked.append(pid)
                case {"ended": pid, "status": status}:
                    self._ended[pid] = status
                case _:
                    raise EngineError(f"the fork server ended\n{tail(self._log)}")


class Engine:
    """One running engine. A context manager; used by one thread."""

    def __init__(
        self,
        *,
        sock: socket.socket,
        log: Path,
        process: subprocess.Popen[bytes] | None,
        server: ForkServer | None,
        pid: int,
    ) -> None:
        """Take over a started child; `Engine.start` is the way to make one."""
        self._sock = sock
        self._buffered = b""
        self._log = log
        self._process = process
        self._server = server
        self._ids = itertools.count(1)
        self._exit_code: int | None = None
        self.pid = pid
        self.start_s = 0.0

    @classmethod
    def start(
        cls, config: EngineConfig, *, log: Path, server: ForkServer | None = None
    ) -> "Engine":
        """Start an engine and wait until it can generate.

        Args:
            config: what to start.
            log: file that gets everything the process prints.
            server: fork from this one instead of starting an interpreter.
        """
        ours, theirs = socket.socketpair()
        env = config.child_env()
        process = None
        with log.open("wb") as sink:
            if server is None:
                process = _spawn("serve", theirs, env=env, sink=sink)
                pid = process.pid
            else:
                pid = server.fork(env=env, sock=theirs, log_fd=sink.fileno())
        theirs.close()
        engine = cls(sock=ours, log=log, process=process, server=server, pid=pid)
        try:
            engine._send({"llm": config.llm_fields()})
            engine.start_s = engine._receive(0, timeout_s=START_TIMEOUT_S)["start_s"]
        except BaseException:
            engine.kill()
            raise
        return engine

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Shut down in order, or kill when the block failed: its state is not to be trusted."""
        if kind is None:
            self.quit()
        else:
            self.kill()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 16,
        logprobs: int | None = None,
        lora: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Run `prompts` as one batch, greedily unless `sampling` says otherwise."""
        command = self.begin(
            prompts, max_tokens=max_tokens, logprobs=logprobs, lora=lora, sampling=sampling
        )
        return self.finish(command)

    def generate_each(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """Run `prompts` one after the other."""
        return [self.generate([prompt], **options)[0] for prompt in prompts]

    def begin(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 16,
        logprobs: int | None = None,
        lora: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> int:
        """Start a batch and return at once: to kill the engine in the middle of it."""
        return self._command(
            "generate",
            prompts=[_as_vllm(prompt) for prompt in prompts],
            sampling={
                "temperature": 0.0,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "logprobs": logprobs,
                **(sampling or {}),
            },
            lora=None if lora is None else dict(lora),
            events=True,
        )

    def finish(self, command: int) -> list[Generation]:
        """Wait for a batch that `begin` started."""
        answers = self._receive(command, timeout_s=COMMAND_TIMEOUT_S)
        return [
            Generation(
                token_ids=tuple(answer.pop("token_ids")),
                logprobs=None if (values := answer.pop("logprobs")) is None else tuple(values),
                **answer,
            )
            for answer in answers
        ]

    def wait_for_token(self, command: int, count: int) -> None:
        """Return once some request of the batch has `count` tokens or more."""
        deadline_s = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            message = self._next(deadline_s=deadline_s)
            if message.get("id") == command and message.get("token", 0) >= count:
                return
            if "token" not in message:
                raise EngineError(f"the batch ended before token {count}: {message}")

    def reset_prefix_cache(self, **arguments: Any) -> bool:
        """Drop the engine's own prefix cache, and the connector's with `reset_connector=True`."""
        return bool(self._ask("reset_prefix_cache", arguments=arguments))

    def metrics(self) -> dict[str, float]:
        """Return counters and gauges as `name{label=value}`; histograms as their sums."""
        return dict(self._ask("metrics"))

    def call(self, target: str, **arguments: Any) -> Any:
        """Run `module:function(llm, **arguments)` in the engine's process; the result is JSON."""
        return self._ask("call", target=target, arguments=arguments)

    def kill(self) -> None:
        """SIGKILL every process of this engine at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._wait(timeout_s=QUIT_TIMEOUT_S)

    def quit(self) -> int:
        """Shut the engine down in order and return its exit code."""
        if self._exit_code is None:
            try:
                self._receive(self._command("quit"), timeout_s=QUIT_TIMEOUT_S)
                self._wait(timeout_s=QUIT_TIMEOUT_S)
            except BaseException:
                self.kill()
                raise
        assert self._exit_code is not None, "_wait sets it"
        return self._exit_code

    @property
    def log_text(self) -> str:
        """Everything the engine has printed so far."""
        return self._log.read_text(errors="replace")

    def _wait(self, *, timeout_s: float) -> None:
        if self._exit_code is not None:
            return
        if self._process is not None:
            self._exit_code = self._process.wait(timeout_s)
        else:
            assert self._server is not None, "an engine has a process or a fork server"
            self._exit_code = self._server.wait(self.pid, timeout_s=timeout_s)
        self._sock.close()

    def _ask(self, op: str, **fields: Any) -> Any:
        return self._receive(self._command(op, **fields), timeout_s=COMMAND_TIMEOUT_S)

    def _command(self, op: str, **fields: Any) -> int:
        command = next(self._ids)
        self._send({"id": command, "op": op, **fields})
        return command

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise EngineError(f"the engine is gone: {error}\n{tail(self._log)}") from error

    def _receive(self, command: int, *, timeout_s: float) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while True:
            message = self._next(deadline_s=deadline_s)
            if message.get("id") != command or "token" in message:
                continue
            if "error" in message:
                raise EngineError(f"{message['error']}\n{message['trace']}\n{tail(self._log)}")
            return message["ok"]

    def _next(self, *, deadline_s: float) -> dict[str, Any]:
        while b"\n" not in self._buffered:
            if self._exit_code is not None:
                raise EngineError(f"the engine died: exit code {self._exit_code}")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._sock], [], [], left_s)[0]:
                raise EngineError(f"the engine did not answer in time\n{tail(self._log)}")
            try:
                data = self._sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EngineError(f"the engine died\n{tail(self._log)}")
            self._buffered += data
        line, _, self._buffered = self._buffered.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def tail(log: Path) -> str:
    """Return the end of a log, titled."""
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    return f"--- {log} ---\n{text}"


@contextlib.contextmanager
def fork_server(*, log: Path) -> Iterator[ForkServer]:
    """Yield a fork server and close it after."""
    server = ForkServer(log=log)
    try:
        yield server
    finally:
        server.close()


def _as_vllm(prompt: Prompt) -> str | dict[str, Any]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return dict(prompt)
    return {"prompt_token_ids": list(prompt)}


def _spawn(
    role: str, theirs: socket.socket, *, env: Mapping[str, str], sink: Any
) -> subprocess.Popen[bytes]:
    """Start the child script in a session of its own, with `theirs` inherited."""
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", str(CHILD), role, str(theirs.fileno())],
        env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        cwd=REPO,
    )


def _end(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout_s)
