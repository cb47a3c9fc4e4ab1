"""Steps that fail, sleep, and requests and engines that end soon: the direct path on vLLM's real scheduler.

As in ``test_schedules`` no engine runs, and every blob is compared with what its key stands for.
"""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore

from prefixstore.clock import SystemClock
from prefixstore.vllm.direct import opening, shapes
from tests.vllm.schedulers import TOKENS, VOCABULARY, Machine, NewMachine, answers_of

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")

GARBAGE = 0x5A5A5A5A
"""What a KV cache holds that nobody has computed."""


def words(count: int, *, seed: int) -> list[int]:
    """Return a prompt."""
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(count)]


def stored(root: Path) -> int:
    """Return how many chunks a root holds."""
    return len(list(root.glob("root/ns/*/*/*/*.kv")))


def answer_all(machine: Machine) -> None:
    """Step as an engine in its user's process does: not once after the last answer."""
    while machine.scheduler.has_unfinished_requests():
        machine.step()


def fail(*_: Any) -> None:
    """Fail as a device that has no memory left."""
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("is_in_model", [True, False])
def test_a_step_that_fails_stores_nothing_and_neither_do_those_after_it(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_in_model: bool
) -> None:
    """In the model, where vLLM saves on the way out, or before it, where no connector is called."""
    machine = new_machine("direct", engine={"max_num_batched_tokens": 128})
    machine.kv[:] = GARBAGE
    execute = machine._execute

    def execute_unheard(output: Any) -> Any:
        return machine._compute(output) if output.num_scheduled_tokens else execute(output)

    machine.add("r", words(250, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_check", fail)
        if not is_in_model:
            patch.setattr(machine, "_execute", execute_unheard)
        with pytest.raises(RuntimeError, match="out of memory"):
            answer_all(machine)
    # The steps that were under way by then; in a program that goes on, all others, too.
    monkeypatch.setattr(machine, "_check", lambda *_: None)
    answer_all(machine)
    machine.add("s", words(100, seed=2), sampling={"prompt_logprobs": 1})
    answer_all(machine)
    machine.worker.shutdown()

    assert machine.answers["s"]
    assert 0 == stored(tmp_path)


def test_who_handles_an_exception_meanwhile_stores_all_the_same(
    new_machine: NewMachine, tmp_path: Path
) -> None:
    """A program may compute what it did not find: its exception is not the engine's."""
    machine = new_machine("direct")
    try:
        fail()
    except RuntimeError:
        machine.serve("r", words(100, seed=1))

    assert 100 // TOKENS == machine.check_root(tmp_path / "root")
    assert "on" == machine.state


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_a_worker_without_others_proves_its_own_steps(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Where several compute together each waits to hear of all."""
    machine = new_machine("direct")
    given: dict[str, Any] = {}
    monkeypatch.setattr(machine.config.parallel_config, "tensor_parallel_size", ranks)
    monkeypatch.setattr(opening, "DirectWorker", lambda **arguments: given.update(arguments))
    opening.open_worker(
        machine.config,
        machine.caches,
        {
            name: machine.memory
            for group in machine.caches.kv_cache_groups
            for name in group.layer_names
        },
        options=machine.worker._options,
        blocks_per_chunk=1,
        observer=SimpleNamespace(),
        clock=SystemClock(),
    )

    assert (ranks == 1) is given["is_alone"]


def core_of(machine: Machine) -> EngineCore:
    """Return vLLM's engine core above a machine, whose sleep discards the KV cache."""

    class Core(EngineCore):
        """One that makes nothing and owns nothing."""

        def __init__(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    def discard(level: int) -> None:
        assert level == 1
        machine.kv[:] = GARBAGE

    core = Core()
    core.scheduler = machine.scheduler
    core.mm_receiver_cache = None
    core.model_executor = SimpleNamespace(
        collective_rpc=lambda *_, **__: [],
        sleep=discard,
        wake_up=lambda _: None,
        is_sleeping=False,
        reset_mm_cache=lambda: None,
        reset_encoder_cache=lambda: None,
        get_kv_connector_handshake_metadata=list,
    )
    return core


def call_workers(machine: Machine) -> None:
    """Call a method of the workers that overwrites their KV cache."""

    def clear(*_: Any, **__: Any) -> list[Any]:
        machine.kv[:] = GARBAGE
        return []

    core = core_of(machine)
    core.model_executor.collective_rpc = clear
    core.collective_rpc("clear")


def let_sleep(machine: Machine) -> None:
    """Let the engine sleep and wake up again."""
    core = core_of(machine)
    core.sleep(level=1)
    core.wake_up()


@pytest.fixture
def new_small_ring(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Machine]:
    """Give a function that makes machines of which most chunks wait for a buffer."""
    monkeypatch.setattr(shapes, "BUFFERS_MAX", 4)
    return lambda: new_machine("direct", blocks=128)


@pytest.mark.parametrize("discard", [let_sleep, call_workers])
def test_an_engine_whose_cache_was_discarded_copies_nothing_of_it_at_its_end(
    new_small_ring: Callable[..., Machine], tmp_path: Path, discard: Callable[[Machine], None]
) -> None:
    """The worker would hear of it with the next step, which never comes."""
    machine = new_small_ring()
    machine.add("r", words(900, seed=2))
    answer_all(machine)
    assert machine.worker._worker.is_storing
    discard(machine)
    machine.worker.shutdown()

    assert machine.check_root(tmp_path / "root") < 900 // TOKENS


@pytest.mark.parametrize("is_apart", [False, True])
def test_an_engine_that_ends_publishes_what_its_process_can_vouch_for(
    new_small_ring: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    is_apart: bool,
) -> None:
    """All in the scheduler's process; a worker of its own process copies nothing that still waits."""
    machine = new_small_ring()
    if is_apart:
        build = machine.connector.build_connector_meta
        monkeypatch.setattr(
            machine.connector,
            "build_connector_meta",
            lambda output: pickle.loads(pickle.dumps(build(output))),
        )
    machine.add("r", words(900, seed=2))
    answer_all(machine)
    machine.worker.shutdown()

    count = machine.check_root(tmp_path / "root")
    assert count < 900 // TOKENS if is_apart else count == 900 // TOKENS


@pytest.mark.parametrize(
    ("tokens", "sampling"),
    [
        (200, {}),
        (200, {"extra_args": {"kv_transfer_params": {"max_load_tokens": 0}}}),
        (200, {"prompt_logprobs": 1}),
        (TOKENS, {}),
    ],
)
@pytest.mark.parametrize("ahead", [0, 1])
def test_requests_that_answer_one_token_store_their_prompt(
    new_machine: NewMachine, tmp_path: Path, ahead: int, tokens: int, sampling: dict[str, Any]
) -> None:
    """They end before it is known what the store holds; what it holds by then is not copied again."""
    machine = new_machine("direct", ahead=ahead)
    machine.serve("first", words(tokens, seed=1), sampling=sampling)
    assert tokens // TOKENS == machine.check_root(tmp_path / "root")
    copies: list[int] = []
    take = machine.worker._worker._stores.take

    def note(orders: Any, *, step: int) -> None:
        copies.extend(order.number for order in orders)
        take(orders, step=step)

    machine.worker._worker._stores.take = note
    machine.scheduler.reset_prefix_cache()
    machine.serve("again", words(tokens, seed=1), sampling=sampling)

    assert [] == copies
    assert [] == machine.left_behind()


def test_the_last_request_of_an_engine_in_its_users_process_is_stored(
    new_machine: NewMachine, tmp_path: Path
) -> None:
    """No step comes after its answer: what it computed goes out with the engine's end."""
    machine = new_machine("direct")
    machine.add("r", words(200, seed=1), sampling={"prompt_logprobs": 1})
    answer_all(machine)
    machine.worker.shutdown()

    assert 200 // TOKENS == machine.check_root(tmp_path / "root")


@pytest.mark.parametrize(
    "fields", [{"ahead": 1, "blocks": 40}, {"ahead": 1, "blocks": 60, "windows": (70, None)}]
)
def test_short_requests_on_a_small_device_store_only_what_is_true(
    new_machine: NewMachine, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Their blocks are given away while it is asked what the store lacks; some leave before they end."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - shown if the test fails
    draw = random.Random(seed)
    machine = new_machine("direct", **fields)
    asked: dict[str, tuple[list[int], int]] = {}
    gone: set[str] = set()
    for _ in range(600):
        if len(machine.scheduler.requests) < 6 and draw.random() < 0.5:
            name = f"r{len(asked)}"
            asked[name] = (
                words(draw.randrange(10, 400), seed=draw.randrange(40)),
                draw.choice([1, 2]),
            )
            sampling = {"prompt_logprobs": 1} if draw.random() < 0.7 else {}
            machine.add(name, asked[name][0], answer=asked[name][1], sampling=sampling)
        if machine.scheduler.requests and draw.random() < 0.05:
            name = draw.choice(list(machine.scheduler.requests))
            gone.add(name)
            machine.abort(name)
        if draw.random() < 0.02:
            machine.scheduler.reset_prefix_cache()
        machine.step()
    machine.settle()

    right = {name: answers_of(*asked[name]) for name in asked if name not in gone}
    assert right == {name: machine.answers[name] for name in right}
    assert [] == machine.left_behind()
    assert 0 < machine.check_root(tmp_path / "root")
