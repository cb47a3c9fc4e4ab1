"""The process that holds one real vLLM engine, driven by JSON lines over an inherited socket.

It owns the engine and nothing else: what is asked, and what is right, lives in the process that
started it (`tests/vllm/engine.py`). It runs as a script in one of two ways:

    python -P engine_child.py serve FD         one engine in a fresh interpreter
    python -P engine_child.py fork-server FD   imports vLLM once, then forks one engine a request

The first line on an engine's socket is its start (`{"llm": ..., "env": ...}`), every later line one
command with an `id`. Answers are `{"id": ..., "ok": ...}`, `{"id": ..., "error": ...}`, and, while a
generation runs and was asked for them, `{"id": ..., "token": ...}` events.

A forked engine shares the interpreter state of the moment before it, so the fork server never
starts a thread and never runs a torch operation: either would leave locks held in the child.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
# One fork request: environment and working directory. Linux's default socket buffer holds it whole.
MAX_FORK_REQUEST_BYTES = 128 * 1024


class Channel:
    """JSON lines over a connected stream socket. Used by one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb")

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None once the other side is gone."""
        line = self._reader.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a reader that is gone is not our concern."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")


def start_engine(fields: dict[str, Any]) -> Any:
    """Build the engine from the keyword arguments of `vllm.LLM`."""
    from vllm import LLM
    from vllm.config import KVEventsConfig, KVTransferConfig

    kinds = {"kv_transfer_config": KVTransferConfig, "kv_events_config": KVEventsConfig}
    return LLM(
        **{name: kinds[name](**value) if name in kinds else value for name, value in fields.items()}
    )


def as_lora(fields: dict[str, Any] | None) -> Any:
    """Turn name, id and path into vLLM's own request for an adapter."""
    if fields is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=fields["name"], lora_int_id=fields["id"], lora_path=fields["path"])


def generate(llm: Any, command: dict[str, Any], channel: Channel) -> list[dict[str, Any]]:
    """Run a batch of prompts to their end and describe each of them.

    The engine is fed and stepped here rather than through `LLM.generate`, which asks for finished
    requests only: the moment of a first token would stay unseen.
    """
    from vllm import SamplingParams

    started_s = time.perf_counter()
    # Finished requests carry the ids they were given, not the ones the engine uses inside.
    ids = [f"{command['id']}.{position}" for position in range(len(command["prompts"]))]
    for key, prompt in zip(ids, command["prompts"], strict=True):
        llm.llm_engine.add_request(
            key,
            prompt,
            SamplingParams(**command["sampling"]),
            lora_request=as_lora(command["lora"]),
        )
    first_token_s: dict[str, float] = {}
    done: dict[str, Any] = {}
    done_s: dict[str, float] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            now_s = time.perf_counter() - started_s
            tokens = output.outputs[0].token_ids
            if tokens:
                first_token_s.setdefault(output.request_id, now_s)
                if command["events"]:
                    channel.send({"id": command["id"], "token": len(tokens)})
            if output.finished:
                done[output.request_id] = output
                done_s[output.request_id] = now_s
    return [
        describe(done[key], first_token_s=first_token_s.get(key, done_s[key]), total_s=done_s[key])
        for key in ids
    ]


def describe(output: Any, *, first_token_s: float, total_s: float) -> dict[str, Any]:
    """Reduce a finished request to what tests compare."""
    completion = output.outputs[0]
    logprobs = completion.logprobs
    return {
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "logprobs": None
        if logprobs is None
        else [
            entry[token].logprob
            for entry, token in zip(logprobs, completion.token_ids, strict=True)
        ],
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "cached_tokens": output.num_cached_tokens or 0,
        "finish_reason": completion.finish_reason,
        "ttft_s": first_token_s,
        "total_s": total_s,
    }


def metrics(llm: Any) -> dict[str, float]:
    """Return every counter and gauge of the engine, labels beside `engine` and `model_name` kept."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", getattr(metric, "sum", None))
        if value is None:
            continue
        labels = {k: v for k, v in metric.labels.items() if k not in ("engine", "model_name")}
        tail = "{" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())) + "}" if labels else ""
        values[metric.name + tail] = value
    return values


def call(llm: Any, command: dict[str, Any]) -> Any:
    """Run `module:function(llm, **arguments)` inside the engine's process."""
    module, _, function = command["target"].partition(":")
    return getattr(importlib.import_module(module), function)(llm, **command["arguments"])


def answer(llm: Any, command: dict[str, Any], channel: Channel) -> Any:
    """Carry out one command."""
    match command["op"]:
        case "generate":
            return generate(llm, command, channel)
        case "reset_prefix_cache":
            return bool(llm.reset_prefix_cache(**command.get("arguments", {})))
        case "metrics":
            return metrics(llm)
        case "call":
            return call(llm, command)
    raise ValueError(f"unknown op {command['op']!r}")


def serve(channel: Channel) -> int:
    """Start the engine that the first message describes and answer until told to quit."""
    start = channel.receive()
    if start is None:
        return 1
    started_s = time.perf_counter()
    try:
        llm = start_engine(start["llm"])
    except BaseException as error:  # noqa: BLE001 - a start may end in SystemExit; all is reported
        traceback.print_exc()
        channel.send({"id": 0, "error": repr(error), "trace": traceback.format_exc()})
        return 1
    channel.send({"id": 0, "ok": {"start_s": time.perf_counter() - started_s}})
    while (command := channel.receive()) is not None and command["op"] != "quit":
        try:
            channel.send({"id": command["id"], "ok": answer(llm, command, channel)})
        except Exception as error:  # noqa: BLE001 - whatever fails is the caller's answer
            traceback.print_exc()
            channel.send(
                {"id": command["id"], "error": repr(error), "trace": traceback.format_exc()}
            )
    llm.llm_engine.engine_core.shutdown()
    if command is not None:
        channel.send({"id": command["id"], "ok": None})
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def preload() -> None:
    """Import what an engine imports at its start; most of a start's time goes there."""
    import transformers
    import vllm
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker

    # Both packages resolve names lazily: touch what an engine is built from.
    _ = (vllm.LLM, vllm.SamplingParams, transformers.AutoTokenizer, transformers.AutoConfig)
    for module in (
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.model_executor.models.llama",
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
        "vllm.v1.kv_offload.tiering.spec",
    ):
        importlib.import_module(module)


def become_engine(request: dict[str, Any], sock: socket.socket, log_fd: int) -> int:
    """Turn the freshly forked process into an engine of its own session, log and environment."""
    os.setsid()
    die_with_parent()
    null_fd = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        status = serve(Channel(sock))
        # Handlers run as they would at an interpreter's end; its teardown is left out, since the
        # modules belong to the fork server as much as to this engine.
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001 - nothing may run the fork server's code after this
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report_ended(control: socket.socket, running: set[int]) -> None:
    """Reap every ended engine and tell the parent how each ended."""
    for pid in sorted(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.discard(pid)
            control.send(
                json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode()
            )


def fork_server(control: socket.socket) -> int:
    """Fork one engine for each request until the parent closes its end."""
    die_with_parent()
    preload()
    running: set[int] = set()
    # A signal that arrives in recvmsg only interrupts it if its handler raises; a wakeup socket
    # and a poll of both is the way without races.
    import selectors

    wake_read, wake_write = socket.socketpair()
    wake_read.setblocking(False)
    wake_write.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write.fileno())
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    control.send(json.dumps({"ready": True}).encode())
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                wake_read.recv(4096)
            report_ended(control, running)
        if control not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(control, MAX_FORK_REQUEST_BYTES, 2)
        if not data:
            return 0
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            selector.close()
            control.close()
            wake_read.close()
            wake_write.close()
            for fd in fds:
                os.set_inheritable(fd, False)
            become_engine(request, socket.socket(fileno=fds[0]), fds[1])
        running.add(pid)
        for fd in fds:
            os.close(fd)
        control.send(json.dumps({"forked": pid}).encode())


def main() -> int:
    """Run as an engine or as a fork server on the inherited descriptor."""
    role, fd = sys.argv[1], int(sys.argv[2])
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    if role == "fork-server":
        return fork_server(sock)
    die_with_parent()
    return serve(Channel(sock))


if __name__ == "__main__":
    sys.exit(main())
