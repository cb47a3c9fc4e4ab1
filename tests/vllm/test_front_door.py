"""What the front door does beside vLLM's connector, above vLLM's real scheduler and without an engine."""

import random
from typing import Any

import pytest

from prefixstore.vllm import backends, connector
from prefixstore.vllm.worth import OBSERVATIONS_NEEDED
from tests.vllm.schedulers import TOKENS, VOCABULARY, NewMachine

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")


def words(count: int, *, seed: int) -> list[int]:
    """Return a prompt."""
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def test_a_worker_that_shares_no_memory_with_the_scheduler_turns_the_store_off(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host its part of each slot lies in a file of its own, and a chunk would lack it."""
    monkeypatch.setattr(backends, "name_shared_memory", lambda: "another kernel:26")
    machine = new_machine(state="off")

    assert "/dev/shm of its own" in machine.connector.store_state[1]
    assert machine.connector.namespace_fields is None


@pytest.mark.parametrize(
    ("windows", "chunks"), [((64,), 4), ((None, 64), 50 + 4), ((40, 64), 3 + 4)]
)
def test_of_a_window_only_what_the_end_of_the_match_needs_is_loaded(
    new_machine: NewMachine, windows: tuple[int | None, ...], chunks: int
) -> None:
    """Windows that are stored densely cost slots and bandwidth for one, and vLLM hits as much as is stored."""
    engine = {"prefix_cache_retention_interval": 16}
    prompt = words(50 * TOKENS + 5, seed=1)
    first = new_machine(windows=windows, engine=engine, blocks=128)
    first.serve("first", prompt)
    second = new_machine(windows=windows, engine=engine, blocks=128)
    loaded: list[Any] = []
    submit = second.connector._tier.submit_load
    second.connector._tier.submit_load = lambda job: (loaded.extend(job.keys), submit(job))

    assert 50 * TOKENS == second.serve("second", prompt)
    assert chunks == len(loaded)


class _SteppingClock:
    """A clock that stands still but where it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


@pytest.mark.parametrize("ahead", [0, 1])
def test_prefills_are_measured_over_their_own_steps(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Steps that compute nothing, as those that wait for a lookup, end too: none is paired with another."""
    clock = _SteppingClock()
    monkeypatch.setattr(connector, "CLOCK", clock)
    machine = new_machine(ahead=ahead)
    execute, take = machine._execute, machine._take

    def compute(output: Any) -> Any:
        if not ahead:
            clock.now_s += sum(output.num_scheduled_tokens.values()) / 100
        return execute(output)

    def take_late() -> None:
        if ahead:  # One step runs while the next one is scheduled.
            clock.now_s += sum(machine._flying[0][0].num_scheduled_tokens.values()) / 100
        take()

    monkeypatch.setattr(machine, "_execute", compute)
    monkeypatch.setattr(machine, "_take", take_late)
    for n in range(2 * OBSERVATIONS_NEEDED):
        machine.serve(f"r{n}", words(200, seed=n), answer=40)

    assert pytest.approx(100, rel=0.05) == machine.connector._tier.prefill.rate.per_s


def test_the_promise_of_a_request_that_is_resumed_ends(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted request that is scheduled again holds slots itself, as one that is scheduled first does."""
    machine = new_machine()
    released: list[str] = []
    monkeypatch.setattr(machine.connector._tier._admission, "release", released.append)
    machine.add("r", words(150, seed=1), answer=30)
    machine.step_until(lambda: len(machine.answers["r"]) > 3, "an answer to begin")
    released.clear()
    machine.scheduler.reset_prefix_cache(reset_running_requests=True)
    machine.step_until(lambda: len(machine.answers["r"]) > 6, "the answer to go on")

    assert {"r"} == set(released)
    machine.settle()


def test_after_a_reset_that_fails_the_store_is_off_all_the_same(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever vLLM makes of its caches, weights may be others from here on."""
    machine = new_machine()

    def fail() -> None:
        raise AssertionError("jobs are left")

    monkeypatch.setattr(machine.connector.scheduler, "reset_cache", fail)
    with pytest.raises(AssertionError, match="jobs are left"):
        machine.connector.reset_cache()

    assert "off" == machine.state
