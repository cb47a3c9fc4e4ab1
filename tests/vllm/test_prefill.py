"""Prefill on the real engine: the keys of a live server, shared work, a kill, and what a server finds."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefixstore.cli.main import run as run_command
from tests.vllm import models, stores
from tests.vllm.conftest import StartServer
from tests.vllm.engine import DEFAULT_ENV, EngineError
from tests.vllm.server import SERVED_NAME, prefixstore_command
from tests.vllm.stores import BLOCK_TOKENS, FORKED, LONG, OTHER, PROMPTS, Place, tokens
from tests.vllm.test_server import serves_from_store

SYSTEM = tokens(21, 5 * BLOCK_TOKENS)
QUESTIONS = [(*SYSTEM, *tokens(30 + each, 1100)) for each in range(14)]
CHAT = [{"role": "user", "content": "Tell me of lighthouses. " * 60}]
OPTIONS = {"cpu_bytes_to_use": stores.CPU_BYTES, "load_policy": "always"}


@pytest.fixture
def prompt_file(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes prompts of tokens, and other lines, to a file."""

    def write(prompts: Sequence[Sequence[int]], *lines: Any) -> str:
        path = tmp_path / "prompts.jsonl"
        every = [*({"prompt": list(prompt)} for prompt in prompts), *lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in every))
        return str(path)

    return write


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_keys_of_prompts_are_those_that_an_engine_stores(
    name: str, place: Place, prompt_file: Callable[..., str]
) -> None:
    """Worked out without running the model, in every KV group; nothing is stored under another key."""
    model = models.tiny(name)
    file = prompt_file(PROMPTS, {"messages": CHAT})
    with place.engine(model, options={"offload_prompt_only": True}) as engine:
        report = engine.call("tests.vllm.prefills:run", root=str(place.root), prompts=file)
        found = engine.call(
            "tests.vllm.prefills:keys", root=str(place.root), prompts=file, model=str(model)
        )
        again = engine.call("tests.vllm.prefills:run", root=str(place.root), prompts=file)

    (chains,) = found.values()
    keys = {key for chain in chains for key in chain}
    assert report["complete"]
    assert set(place.blobs()) <= keys
    if name == "llama":
        assert set(place.blobs()) == keys
        assert report["stored_chunks"] == len(keys) == report["chunks"]
        # What FORKED shares with LONG was computed once.
        assert report["computed_tokens"] <= report["tokens"] - 7 * BLOCK_TOKENS
    assert (again["computed_prompts"], again["computed_tokens"]) == (0, 0)


def test_a_killed_prefill_is_taken_over_by_two_that_share_the_rest(
    new_place: Callable[..., Place], tiny_llama: Path, prompt_file: Callable[..., str]
) -> None:
    """What was stored is not computed again, no chunk is computed by both, and no claim stays behind."""
    file = prompt_file(QUESTIONS)
    first = new_place()
    root = str(first.root)
    chunks = 5 + 14 * 8

    def prefill(engine: Any, reports: list[dict[str, Any]]) -> None:
        try:
            reports.append(engine.call("tests.vllm.prefills:run", root=root, prompts=file))
        except EngineError:
            return  # Killed.

    always = {"load_policy": "always"}
    with first.engine(tiny_llama, options=always) as engine:
        writer = stores.await_io_process(engine)
        thread = threading.Thread(target=prefill, args=(engine, []))
        thread.start()
        stores.until(lambda: len(first.blobs()) > 15, "some chunks")
        engine.kill()
        thread.join()
        # What was accepted is still published.
        stores.until(lambda: not stores.is_running(writer), "the I/O process to end")
    before = len(first.blobs())
    reports: list[dict[str, Any]] = []
    places = [new_place(root=first.root) for _ in range(2)]
    with (
        places[0].engine(tiny_llama, options=always) as one,
        places[1].engine(tiny_llama, options=always) as two,
    ):
        threads = [threading.Thread(target=prefill, args=(e, reports)) for e in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert before < chunks
    assert [report["complete"] for report in reports] == [True, True]
    assert len(first.blobs()) == chunks
    assert sum(report["stored_chunks"] for report in reports) == chunks - before
    # Each prompt's tail is computed with it, whatever was stored.
    tails = 14 * (len(QUESTIONS[0]) % BLOCK_TOKENS + BLOCK_TOKENS)
    computed = sum(report["computed_tokens"] for report in reports)
    assert computed <= (chunks - before) * BLOCK_TOKENS + tails
    assert [path for path in Path(root, "prefill").rglob("*") if path.is_file()] == []


def test_a_server_answers_from_what_the_command_line_prefilled(
    place: Place,
    tiny_llama: Path,
    prompt_file: Callable[..., str],
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Raw text, a chat and tokens are loaded whole; the pin holds; erased, they are gone."""
    text = "The keeper of the lighthouse wrote down every ship. " * 40
    file = prompt_file([LONG, FORKED, OTHER], {"prompt": text}, {"messages": CHAT}, "short")
    words = prefixstore_command(tiny_llama, place.root, options=OPTIONS)
    words[words.index("serve")] = "prefill"
    words[words.index("--") :] = ["--prompts", file, "--pin", "lighthouse", "--json", "--"]
    same = ("--dtype", "float32", "--max-model-len", "4096", "--enforce-eager")
    env = {**os.environ, **DEFAULT_ENV, "XDG_CACHE_HOME": str(place.cache)}
    done = subprocess.run(
        [*words, *same], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    command = prefixstore_command(tiny_llama, place.root, "--dtype", "float32", options=OPTIONS)
    with start_server(command, env={"XDG_CACHE_HOME": str(place.cache)}) as server:
        stores.until(lambda: serves_from_store(server), "the store to be on")
        raw = server.complete(text)
        long = server.complete(LONG)
        usage = server.client.chat.completions.create(
            model=SERVED_NAME, messages=CHAT, max_tokens=2
        ).usage

    def whole(count: int) -> int:
        return (count - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    assert report["complete"]
    assert (report["prompts"], report["short_prompts"]) == (6, 1)
    assert raw.cached_tokens == whole(raw.prompt_tokens)
    assert long.cached_tokens == whole(len(LONG))
    assert usage.prompt_tokens_details.cached_tokens == whole(usage.prompt_tokens)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache))
    assert run_command(["gc", str(place.root), "--max-bytes", "0", "--yes"]) == 1
    assert len(place.blobs()) == report["chunks"]
    assert run_command(["rm", str(place.root), "--pin", "lighthouse", "--yes"]) == 0
    assert place.blobs() == {}
