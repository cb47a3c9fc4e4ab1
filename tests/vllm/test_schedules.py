"""Arrivals, aborts, preemptions, sessions and resets on vLLM's real scheduler, with every byte of KV checked.

No engine runs: the model is arithmetic (``tests.vllm.schedulers``), so a test sees thousands of steps a second.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import PoolerConfig
from vllm.v1.request import RequestStatus

from prefixstore.errors import InvalidError
from tests.vllm.schedulers import TOKENS, VOCABULARY, Machine, answers_of

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")

NewMachine = Callable[..., Machine]
MODES: dict[str, dict[str, Any]] = {
    "tier": {"cpu_bytes_to_use": 2**20, "load_policy": "always"},
    "direct": {"mode": "direct", "buffers_bytes": 2**20},
}
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def new_machine(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NewMachine]:
    """Give a function that makes machines on one root, each with its store open; all are closed."""
    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machines: list[Machine] = []

    def make(mode: str, *, options: dict[str, Any] | None = None, **fields: Any) -> Machine:
        given = {"root": str(tmp_path / "root"), "miss_ttl_s": 0.001, **MODES[mode]}
        machine = Machine(tiny_llama, {**given, **(options or {})}, **fields)
        machines.append(machine)
        machine.await_state("on")
        return machine

    yield make
    for machine in machines:
        machine.close()


def words(count: int, *, seed: int) -> list[int]:
    """Return a prompt."""
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def end_turn(machine: Machine) -> None:
    """Step until the session waits for its next input."""
    session = machine.scheduler.requests["session"]
    waiting = RequestStatus.WAITING_FOR_STREAMING_REQ
    machine.step_until(lambda: session.status is waiting, "the turn to end")


def take_turn(machine: Machine, turn: list[int]) -> None:
    """Give the session its next input, and let it answer."""
    machine.add("session", turn, resumable=True)
    end_turn(machine)


@modes
def test_a_session_that_goes_on_stores_and_hits_what_it_computed(
    new_machine: NewMachine, mode: str, tmp_path: Path
) -> None:
    """Each turn of a streaming session comes with all its blocks; chunks are stored from the right ones."""
    machine = new_machine(mode)
    turns = [words(75, seed=1), words(100, seed=2), words(90, seed=3)]
    for turn in turns:
        take_turn(machine, turn)
    machine.abort("session")
    machine.settle()
    machine.scheduler.reset_prefix_cache()
    whole = [token for turn in turns for token in turn]
    loaded = machine.serve("whole", whole, answer=3)

    assert answers_of(whole, 3) == machine.answers["whole"]
    assert len(whole) // TOKENS * TOKENS == loaded
    assert len(whole) // TOKENS <= machine.check_root(tmp_path / "root")


@modes
def test_a_reset_that_preempts_costs_a_step(new_machine: NewMachine, mode: str) -> None:
    """Requests that were running are asked about again, hit at once, and answer as if nothing had been."""
    machine = new_machine(mode)
    prompts = {f"r{n}": words(150, seed=n) for n in range(4)}
    for name, prompt in prompts.items():
        machine.add(name, prompt, answer=30)
    machine.step_until(
        lambda: all(len(answer) > 3 for answer in machine.answers.values()), "answers to begin"
    )
    machine.scheduler.reset_prefix_cache(reset_running_requests=True)
    machine.settle()

    assert machine.answers == {name: answers_of(prompt, 30) for name, prompt in prompts.items()}


@modes
@pytest.mark.parametrize("pooling", ["MEAN", "LAST"])
def test_a_model_that_pools_over_its_prompt_is_refused(
    new_machine: NewMachine, mode: str, pooling: str
) -> None:
    """Part of the prompt loaded would end vLLM's engine there; one that takes the last token is served."""
    pooler = PoolerConfig(seq_pooling_type=pooling)
    engine = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": pooler,
        "max_num_batched_tokens": 1024,  # A prompt that is pooled whole is computed in one step.
    }
    if pooling == "LAST":
        new_machine(mode, engine=engine)
        return
    with pytest.raises(InvalidError, match="every token of a prompt"):
        new_machine(mode, engine=engine)


def test_a_preempted_session_leaves_the_store_on(new_machine: NewMachine) -> None:
    """What it computes again after a preemption is its own KV, not another connector's."""
    machine = new_machine("tier")
    machine.add("session", words(75, seed=1), answer=30, resumable=True)
    session = machine.scheduler.requests["session"]
    machine.step_until(lambda: session.num_output_tokens > 3, "an answer to begin")
    machine.scheduler.reset_prefix_cache(reset_running_requests=True)
    end_turn(machine)
    take_turn(machine, words(75, seed=2))
    machine.abort("session")
    machine.settle()

    assert "on" == machine.state
