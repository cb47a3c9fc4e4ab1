"""Arrivals, aborts, preemptions, sessions and resets on vLLM's real scheduler, with every byte of KV checked.

No engine runs: the model is arithmetic (``tests.vllm.schedulers``), so a test sees thousands of steps a second.
"""

import contextlib
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.config import PoolerConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from prefixstore.errors import InvalidError
from prefixstore.vllm.direct import opening
from prefixstore.vllm.direct.device import HostDevice, Mark
from prefixstore.vllm.direct.pages import Copies
from tests.vllm.schedulers import MODES, TOKENS, VOCABULARY, Machine, NewMachine, answers_of

if TYPE_CHECKING:
    from collections.abc import Callable

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = pytest.mark.filterwarnings("default")

modes = pytest.mark.parametrize("mode", MODES)


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
def test_prompts_with_embeddings_neither_store_nor_hit(
    new_machine: NewMachine, mode: str, tmp_path: Path
) -> None:
    """A block hash tells neither their dtype nor which of them are used; token prompts hit as ever."""
    machine = new_machine(mode)
    prompt = words(6 * TOKENS, seed=1)
    embeddings = torch.zeros(len(prompt), 4)

    machine.serve("embedded", prompt, prompt_embeds=embeddings)
    assert 0 == machine.check_root(tmp_path / "root")
    machine.serve("tokens", prompt)
    stored = machine.check_root(tmp_path / "root")

    other = new_machine(mode)
    assert 0 == other.serve("embedded again", prompt, prompt_embeds=embeddings)
    assert 0 < other.serve("tokens again", prompt)
    assert 0 < stored == len(list((tmp_path / "root").glob("ns/*/*/*/*.kv")))


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


@pytest.mark.parametrize("fails", ["plan", "give_away"])
def test_workers_hear_of_lost_blocks_whatever_else_fails(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """A step that cannot be planned costs its stores; what is not known to stay is read no more."""
    machine = new_machine("direct")
    machine.connector._scheduler.doom("r", [[1]], 16)
    machine.connector._scheduler.take_loads()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError(fails)

    monkeypatch.setattr(machine.connector._scheduler, fails, fail)
    new = SimpleNamespace(block_ids=([7],), num_computed_tokens=0)
    cached = SimpleNamespace(
        req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
    )
    output = SimpleNamespace(
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=cached,
        kv_cache_block_copies=None,
        preempted_req_ids=None,
        num_scheduled_tokens={},
        kv_connector_block_state=SimpleNamespace(resolve_block_ids=None),
    )
    orders = machine.connector.build_connector_meta(output).orders

    assert orders.are_all_overwritten is (fails == "give_away")


@pytest.mark.parametrize("windows", [(None,), (70, None)])
def test_stores_that_wait_keep_nobody_waiting(
    new_machine: NewMachine, windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    """While the I/O process sleeps blocks are handed on, resets succeed, and no wrong byte is stored."""
    machine = new_machine(
        "direct", blocks=40, windows=windows, options={"buffers_bytes": 2**20, "load_threads": 1}
    )
    process = machine.worker._worker._client._pump._process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for number in range(30):
            machine.add(f"r{number}", words(200, seed=number))
        machine.step_until(lambda: not machine.scheduler.has_unfinished_requests(), "all answers")
        assert machine.scheduler.reset_prefix_cache(reset_running_requests=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # Replaced already, for hanging.
            os.kill(process.pid, signal.SIGCONT)
    machine.settle()
    machine.serve("last", words(300, seed=99))

    assert machine.answers["last"] == answers_of(words(300, seed=99), 1)
    assert [] == machine.left_behind()
    machine.check_root(tmp_path / "root")


@modes
def test_calling_the_workers_turns_the_store_off(new_machine: NewMachine, mode: str) -> None:
    """A call that may replace weights: nothing is stored or found from then on. One that reads is none."""
    machine = new_machine(mode)
    for method, state in (("check_health", "on"), ("reload_weights", "off")):
        engine = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda *_: []))
        EngineCore.collective_rpc(engine, method)
        machine.await_state(state)

    assert 0 == machine.serve("r", words(100, seed=1))
    assert machine.answers["r"] == answers_of(words(100, seed=1), 1)


@dataclass
class Traffic:
    """Clients, an operator and a bad disk, all drawn from one seed."""

    machine: Machine
    root: Path
    draw: random.Random
    asked: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        lengths = (self.draw.randrange(20, 400) for _ in range(5))
        self.beginnings = [words(length, seed=length) for length in lengths]

    def run(self, steps: int) -> None:
        """Let so many steps pass, and wait for the rest."""
        acts: list[tuple[float, Callable[[], None]]] = [
            (0.1, self.arrive),
            (0.01, self.leave),
            (0.01, self.go_on),
            (0.01, lambda: bool(self.machine.scheduler.reset_prefix_cache()) and None),
            (0.001, self.reset_running),
            (0.003, self.lose_a_blob),
        ]
        for _ in range(steps):
            for chance, act in acts:
                if self.draw.random() < chance:
                    act()
            self.machine.step()
        for name in self.sessions():
            self.gone.add(name)
            self.machine.abort(name)
        self.machine.settle()

    def live(self) -> list[Request]:
        """Return the requests that have not ended."""
        requests = self.machine.scheduler.requests.values()
        return [request for request in requests if not request.is_finished()]

    def sessions(self) -> list[str]:
        """Return the sessions that have not ended."""
        return [request.request_id for request in self.live() if request.resumable]

    def arrive(self) -> None:
        """Ask something that begins like other prompts; some take streaming input."""
        if len(self.live()) >= 10:
            return
        beginning = self.draw.choice(self.beginnings)
        own = [self.draw.randrange(VOCABULARY) for _ in range(self.draw.randrange(60))]
        prompt = beginning[: self.draw.randrange(1, len(beginning) + 1)] + own
        name, answer = f"r{len(self.asked)}", self.draw.choice([1, 5, 40])
        self.asked[name] = (prompt, answer)
        self.machine.add(
            name,
            prompt,
            answer=answer,
            sampling={"prompt_logprobs": 1} if self.draw.random() < 0.05 else {},
            resumable=self.draw.random() < 0.1,
            priority=self.draw.randrange(3),
        )

    def leave(self) -> None:
        """Abort somebody."""
        if live := self.live():
            name = self.draw.choice(live).request_id
            self.gone.add(name)
            self.machine.abort(name)

    def go_on(self) -> None:
        """Give a session more input, or end it."""
        if sessions := self.sessions():
            name = self.draw.choice(sessions)
            self.gone.add(name)  # What it answers depends on when the input came.
            if self.draw.random() < 0.3:
                self.machine.abort(name)
            else:
                self.machine.add(name, words(self.draw.randrange(1, 100), seed=7), resumable=True)

    def reset_running(self) -> None:
        """Reset the engine's cache with all that runs, where vLLM can."""
        waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
        requests = self.machine.scheduler.requests.values()
        if not any(r.is_finished() or r.resumable or r.status is waiting for r in requests):
            self.machine.scheduler.reset_prefix_cache(reset_running_requests=True)

    def lose_a_blob(self) -> None:
        """Remove a blob behind the engine's back."""
        if blobs := sorted(self.root.glob("ns/*/*/*/*.kv")):
            self.draw.choice(blobs).unlink()


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("tier", {"ahead": 0, "blocks": 50, "options": {"blocks_per_chunk": 2}}),
        ("tier", {"ahead": 1, "blocks": 50, "options": {"cpu_bytes_to_use": 20 * 1024}}),
        ("tier", {"ahead": 0, "blocks": 80, "windows": (None, 70)}),
        ("direct", {"ahead": 0, "blocks": 50, "options": {"blocks_per_chunk": 3}}),
        ("direct", {"ahead": 1, "blocks": 50, "engine": {"scheduling_policy": "priority"}}),
        ("direct", {"ahead": 0, "blocks": 80, "windows": (None, 70)}),
        ("direct", {"ahead": 1, "blocks": 80, "windows": (70, None)}),
        ("direct", {"ahead": 1, "blocks": 50, "windows": (100,)}),
    ],
)
def test_whatever_comes_every_answer_and_every_byte_is_right(
    new_machine: NewMachine, mode: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Under random traffic on a small device answers are right, nothing stays behind, and blobs are true."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - shown if the test fails
    machine = new_machine(mode, **fields)
    traffic = Traffic(machine, tmp_path / "root", random.Random(seed))
    traffic.run(1500)

    right = {n: answers_of(*asked) for n, asked in traffic.asked.items() if n not in traffic.gone}
    assert right == {name: machine.answers[name] for name in right}
    assert [] == machine.left_behind()
    assert 0 < machine.check_root(tmp_path / "root")
    assert "on" == machine.state


class LateDevice(HostDevice):
    """Copies from the KV cache happen some polls late, as on a device, or when the model waits for them."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._pending: dict[object, tuple[Copies, int]] = {}
        self.holds = 0

    def store(self, copies: Copies, *, after: Mark) -> Mark:
        """Begin a copy."""
        del after
        mark = object()
        self._pending[mark] = (copies, self._draw.randrange(12))
        return mark

    def is_past(self, mark: Mark) -> bool:
        """Let the time of a copy pass."""
        if mark not in self._pending:
            return True
        copies, polls = self._pending[mark]
        self._pending[mark] = (copies, polls - 1)
        if polls <= 0:
            self._copy_up_to(mark)
        return mark not in self._pending

    def hold_model(self, mark: Mark) -> None:
        """Have a copy precede what the model does next."""
        self.holds += mark in self._pending
        self._copy_up_to(mark)

    def finish(self) -> None:
        """Have all copies made."""
        for mark in [*self._pending]:
            self._copy_up_to(mark)

    def _copy_up_to(self, mark: Mark) -> None:
        while mark in self._pending:
            first = next(iter(self._pending))
            super().store(self._pending.pop(first)[0], after=None)


@pytest.mark.parametrize(
    "fields",
    [
        {"ahead": 0, "blocks": 40, "options": {"blocks_per_chunk": 2}},
        {"ahead": 1, "blocks": 50},
        {"ahead": 1, "blocks": 60, "windows": (70, None)},
    ],
)
def test_copies_that_are_under_way_read_no_block_that_was_handed_on(
    new_machine: NewMachine,
    fields: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that copies late every blob is true, since the model waits where it must."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - shown if the test fails
    device = LateDevice(seed)
    monkeypatch.setattr(opening, "choose_device", lambda _: device)
    machine = new_machine("direct", **fields)
    traffic = Traffic(machine, tmp_path / "root", random.Random(seed))
    for _ in range(5):
        traffic.run(800)
        if device.holds:  # Some traffic gives away no block that is still read.
            break

    right = {n: answers_of(*asked) for n, asked in traffic.asked.items() if n not in traffic.gone}
    assert right == {name: machine.answers[name] for name in right}
    assert [] == machine.left_behind()
    assert 0 < machine.check_root(tmp_path / "root")
    assert device.holds > 0
