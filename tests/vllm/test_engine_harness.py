"""The harness itself, on plain vLLM: what later tests take for granted about their engines."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm import models
from tests.vllm.conftest import StartEngine, StartServer
from tests.vllm.engine import Engine, EngineConfig, EngineError, ForkServer
from tests.vllm.server import vllm_command
from tests.vllm.stores import FLOAT32, LONG, Reference

# Five full blocks of 128 tokens and a tail.
DRAW = random.Random(7)
PROMPT = tuple(DRAW.randrange(100, models.VOCAB_SIZE) for _ in range(700))


@pytest.fixture(scope="module")
def engine(
    forks: ForkServer, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Give one engine to all that leave it as it was."""
    config = EngineConfig(model=tiny_llama, llm=FLOAT32)
    log = tmp_path_factory.mktemp("harness") / "engine.log"
    with Engine.start(config, log=log, server=forks) as started:
        yield started


def test_two_processes_agree_on_every_token(engine: Engine, alone: Reference) -> None:
    """The same prompt gives the same tokens and logprobs in two engine processes."""
    (answer,) = engine.generate([LONG], logprobs=1)

    assert alone.cold[0].token_ids == answer.token_ids
    assert alone.cold[0].logprobs == answer.logprobs
    assert len(set(answer.token_ids)) > 4, "the model must not repeat itself"


def test_a_forked_engine_answers_as_a_fresh_one(
    start_engine: StartEngine, tiny_llama: Path, alone: Reference
) -> None:
    """An engine forked from the preloaded parent computes what a fresh interpreter computes."""
    with start_engine(tiny_llama, llm=FLOAT32, fresh=True) as engine:
        (fresh,) = engine.generate([LONG], logprobs=1)
    assert alone.cold[0].token_ids == fresh.token_ids
    assert alone.cold[0].logprobs == fresh.logprobs


def test_the_engines_own_cache_is_seen_and_reset(engine: Engine) -> None:
    """Cached tokens are reported, and gone after a reset of the prefix cache."""
    before = engine.metrics()["vllm:prefix_cache_queries"]
    cached = [engine.generate([PROMPT])[0].cached_tokens for _ in range(2)]
    assert engine.reset_prefix_cache()
    cached.append(engine.generate([PROMPT])[0].cached_tokens)
    queries = engine.metrics()["vllm:prefix_cache_queries"] - before
    assert cached == [0, 640, 0]
    assert queries == 2100


def test_a_batch_keeps_the_order_of_its_prompts(engine: Engine) -> None:
    """A batch answers each prompt as it answers it alone."""
    prompts = [PROMPT[:300], PROMPT[100:150], "Once upon a time"]
    alone = [answer.token_ids[:4] for answer in engine.generate_each(prompts)]
    together = [answer.token_ids[:4] for answer in engine.generate(prompts)]
    assert together == alone


def test_kill_in_the_middle_of_a_generation(start_engine: StartEngine, tiny_llama: Path) -> None:
    """An engine killed between two tokens is gone with all its processes."""
    engine = start_engine(tiny_llama, llm={"dtype": "float32"})
    command = engine.begin([PROMPT], max_tokens=400)
    engine.wait_for_token(command, 2)
    engine.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, signal.SIG_DFL)
    with pytest.raises(EngineError, match=r"died|gone"):
        engine.finish(command)


def test_a_start_that_fails_shows_the_reason(start_engine: StartEngine, tiny_llama: Path) -> None:
    """The exception of a failed start reaches the test."""
    with pytest.raises(EngineError, match="max_model_len"):
        start_engine(tiny_llama, llm={"max_model_len": 999_999})


def test_the_api_server_streams_counts_and_stops(
    start_server: StartServer, tiny_llama: Path
) -> None:
    """A served model tells its cached tokens, shows metrics, and ends in order when asked."""
    server = start_server(vllm_command(tiny_llama, "--dtype", "float32"))
    first, second = server.complete(PROMPT), server.complete(PROMPT)
    assert (first.prompt_tokens, first.cached_tokens) == (700, 0)
    assert (second.text, second.cached_tokens) == (first.text, 640)
    assert server.metrics()["vllm:prefix_cache_hits_total"] == 640
    assert server.stop() == 0
