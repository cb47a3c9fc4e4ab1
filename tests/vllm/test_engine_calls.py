"""What the front door hears of the engine: whatever is called, and whatever fails of ours, vLLM goes on."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from prefixstore.vllm import engine_calls
from prefixstore.vllm.connector import PrefixStoreConnector


class Ears:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def workers_called(self, method: str) -> None:
        """Note a call."""
        self.called.append(method)


class Unhashable:
    """Can be called, and hardly anything else."""

    __hash__ = None

    def __call__(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"broken on purpose: {name}")

    def __repr__(self) -> str:
        raise RuntimeError("broken on purpose")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("broken on purpose")


@pytest.fixture
def ears(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ears]:
    """Give somebody who listens, alone."""
    listener = Ears()
    monkeypatch.setattr(engine_calls, "_listeners", {listener})
    return listener


@pytest.fixture
def front_door() -> PrefixStoreConnector:
    """Give a front door without an engine."""
    made = object.__new__(PrefixStoreConnector)
    made._tier = made._adapters = made._boundaries = None
    made._accounted, made._preemptions = {}, {}
    made._engine_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    return made


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("list_loras", []),
        ("release_late_interaction_query_cache", []),  # vLLM's own scoring ends with it.
        ("reload_weights", ["reload_weights"]),
        (Unhashable(), ["Unhashable"]),
        (functools.partial(print), ["partial"]),
        (lambda: None, ["<lambda>"]),
    ],
    ids=["reads", "scores", "replaces", "unhashable", "partial", "a function"],
)
def test_any_call_to_the_workers_is_told_unless_it_only_reads(
    ears: Ears, method: Callable[..., Any] | str, told: list[str]
) -> None:
    """A caller may send whatever can be called."""
    engine_calls._tell_called(method)

    assert told == [name.rpartition(".")[2] for name in ears.called]


def test_no_failure_while_an_adapter_loads_crosses_into_the_engine(
    front_door: PrefixStoreConnector,
) -> None:
    """Neither before the load, nor after it."""
    failures: list[str] = []
    front_door._tier = SimpleNamespace(count_failure=failures.append)
    front_door._adapters = SimpleNamespace(
        mention=lambda lora: lora, loaded=lambda _use: _fail(), removed=lambda _id: _fail()
    )

    front_door.adapter_loading("an adapter")()
    front_door.adapter_removed(1)

    assert ["_adapter_loaded", "adapter_removed"] == failures


def test_requests_are_noted_as_they_are_scheduled(front_door: PrefixStoreConnector) -> None:
    """New ones, and those that were preempted: in this step the workers use their adapters."""
    scheduled: list[str] = []
    front_door._tier = SimpleNamespace(
        scheduled=scheduled.append, prefill=SimpleNamespace(begin_step=lambda *_a, **_k: None)
    )
    step = SimpleNamespace(
        num_scheduled_tokens={},
        scheduled_new_reqs=[SimpleNamespace(req_id="new", num_computed_tokens=0, mm_features=[])],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["goes on", "again"], num_computed_tokens=[7, 0], resumed_req_ids={"again"}
        ),
        finished_req_ids=set(),
    )

    front_door._begin_step(step)

    assert ["new", "again"] == scheduled


def _fail() -> None:
    raise RuntimeError("broken on purpose")
