"""Requests with an adapter below vLLM's real manager: their chunks go by keys of their own."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from prefixstore.keys import Key, derive_key
from prefixstore.vllm import adapter_files
from prefixstore.vllm.adapter_files import AdapterFiles
from prefixstore.vllm.adapters import Adapters, AdapterUse
from prefixstore.vllm.weights import WeightDigests
from tests.vllm.managers import Driver, prompt, stored_in

KEYS = prompt("a", 6)


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoRARequest:
    """Give an adapter on disk."""
    monkeypatch.setattr(adapter_files, "SETTLED_S", 0.0)
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return LoRARequest("sql", 1, str(path))


class Engine:
    """A manager that serves adapters."""

    def __init__(self, drive: Callable[..., Driver], **options: Any) -> None:
        self.driver = drive(**options)
        self.driver.await_state("on")
        self.adapters = Adapters(capacity=4, settings={}, digests=WeightDigests(None))
        self.driver.tier.serve_adapters(self.adapters)

    def load(self, lora: LoRARequest) -> None:
        """Load an adapter beforehand."""
        use = self.adapters.mention(lora)
        self.adapters.loaded(use)
        self.driver._until(lambda: use.may_load, "the adapter to be proved")

    def serve(self, name: str, lora: LoRARequest) -> int:
        """Serve the prompt with an adapter; returns how many chunks were not computed."""
        return self.driver.serve(name, KEYS, use=self.begin(name, lora))

    def begin(self, name: str, lora: LoRARequest) -> AdapterUse:
        """Let a request with an adapter arrive."""
        use = self.adapters.begin(name, lora)
        assert use is not None
        return use

    def skipped(self) -> dict[tuple[str, ...], int]:
        """Return how many chunks were skipped, by reason."""
        stats = self.driver.tier.get_stats()
        return stats.data["data"].get("vllm:prefixstore_stores_skipped", {}) if stats else {}


def test_an_adapters_chunks_are_found_by_the_next_engine_under_keys_of_their_own(
    drive, lora: LoRARequest, tmp_path: Path
) -> None:
    """The base model's chunks of the same tokens are others, and each finds its own."""
    first = Engine(drive)
    assert 0 == first.serve("adapted", lora)
    first.driver.settle()
    adapted = stored_in(tmp_path / "root")
    digest = first.begin("more", lora).adapter.digest
    assert digest is not None
    assert adapted == {derive_key(Key(key), digest) for key in KEYS}

    second = Engine(drive)
    second.load(lora)

    assert 6 == second.serve("adapted", lora)
    third = Engine(drive)
    assert 0 == third.driver.serve("base", KEYS)
    third.driver.settle()
    assert adapted | set(KEYS) == stored_in(tmp_path / "root")


def test_a_request_right_after_a_load_waits_for_the_proof(
    drive, lora: LoRARequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter's content is being read; it is asked again, and then hits."""
    warm = Engine(drive)
    warm.serve("warm", lora)
    warm.driver.settle()
    check, answers = AdapterFiles.check, threading.Event()
    monkeypatch.setattr(AdapterFiles, "check", lambda self: (answers.wait(), check(self))[1])
    engine = Engine(drive)
    engine.adapters.loaded(engine.adapters.mention(lora))
    context = engine.driver.begin("r1", KEYS)
    engine.driver.tier.adapt("r1", engine.begin("r1", lora))

    while_reading = engine.driver.scan(context, KEYS)
    answers.set()
    engine.driver._until(
        lambda: engine.driver.scan(context, KEYS) == 6 or engine.driver.end_step(), "the hits"
    )

    assert while_reading is None


def test_without_a_load_beforehand_the_first_request_computes_and_the_second_hits(
    drive, lora: LoRARequest
) -> None:
    """What it computes is stored: that proves what the worker holds."""
    engine = Engine(drive)

    assert 0 == engine.serve("r1", lora)
    engine.driver.settle()
    engine.driver.reset()

    assert 6 == engine.serve("r2", lora)


def test_what_was_computed_with_replaced_files_is_not_stored(
    drive, lora: LoRARequest, tmp_path: Path
) -> None:
    """The proof comes after the computing: chunks that wait for it are dropped, and counted."""
    engine = Engine(drive)
    use = engine.begin("r1", lora)
    (Path(lora.lora_path) / "adapter_model.safetensors").write_bytes(b"others!")

    engine.driver.serve("r1", KEYS, use=use)
    engine.driver.settle()

    assert set() == stored_in(tmp_path / "root")
    assert {("adapter",): 6} == engine.skipped()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_question_that_cannot_be_put_is_a_miss(
    drive, lora: LoRARequest, monkeypatch: pytest.MonkeyPatch, *, adapted: bool
) -> None:
    """Its request would wait for the verdict for ever."""
    engine = Engine(drive)
    engine.load(lora)
    tier = engine.driver.tier
    monkeypatch.setattr(tier._binding.client, "find", lambda *_args, **_more: _fail())

    served = engine.serve("r", lora) if adapted else engine.driver.serve("r", KEYS)

    assert 0 == served
    stats = tier.get_stats()
    assert stats is not None
    assert {("_try_find",): 1} == stats.data["data"]["vllm:prefixstore_failed_callbacks"]


def test_a_proof_that_cannot_be_asked_for_is_a_miss(
    drive, lora: LoRARequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the keys that it is to let be asked about wait for it."""
    engine = Engine(drive)
    engine.load(lora)
    monkeypatch.setattr(engine.adapters, "prove", lambda *_args, **_more: _fail())

    assert 0 == engine.serve("r", lora)


def test_a_reset_waits_for_proofs_as_for_stores(drive, lora: LoRARequest, tmp_path: Path) -> None:
    """What was computed before it is published, as without an adapter."""
    engine = Engine(drive)
    engine.serve("r1", lora)

    engine.driver.reset()

    assert 6 == len(stored_in(tmp_path / "root"))


def test_routers_hear_of_an_adapters_chunks_by_vllms_hashes(drive, lora: LoRARequest) -> None:
    """They know no other."""
    engine = Engine(drive, events=True)
    engine.serve("r1", lora)
    engine.driver.settle()

    events = engine.driver.tier.take_events()

    assert set(KEYS) == {key for event in events for key in event.keys}


def _fail() -> None:
    raise RuntimeError("broken on purpose")
