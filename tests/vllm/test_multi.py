"""Beside another connector under vLLM's MultiConnector: works, or says why not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import stores
from tests.vllm.engine import Engine, EngineError
from tests.vllm.stores import FLOAT32, LONG, Place


def beside(
    place: Place, model: Path, *, state: str, ours: Mapping[str, Any] = {}, **options: Any
) -> Engine:
    """Start an engine with a companion before prefixstore, and wait for the store's state."""
    companion = {
        "kv_connector": "CompanionConnector",
        "kv_connector_module_path": "tests.vllm.companion",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [companion, place.transfer(ours)]},
    }
    engine = place.start(
        model,
        llm={**FLOAT32, "kv_transfer_config": transfer},
        env={"XDG_CACHE_HOME": str(place.cache)},
    )
    stores.await_state(engine, state)
    return engine


def test_beside_a_connector_that_loads_nothing_prompts_are_stored_and_hit(
    place: Place, tiny_llama: Path
) -> None:
    """Both see every request; the store does what it does alone."""
    with beside(place, tiny_llama, state="on") as engine:
        (cold,) = engine.generate([LONG])
        place.await_blobs(13)
    with beside(place, tiny_llama, state="on") as engine:
        (warm,) = engine.generate([LONG])

    assert [0, 13] == stores.cached_chunks([cold, warm])
    assert stores.outputs([cold]) == stores.outputs([warm])


@pytest.mark.parametrize(
    ("option", "state", "sentence"),
    [
        ("handshake", "off", "with a handshake of its own"),
        ("loads", "on", "another connector loaded 128 tokens of KV"),
    ],
)
def test_what_cannot_be_vouched_for_turns_the_store_off(
    place: Place, tiny_llama: Path, option: str, state: str, sentence: str
) -> None:
    """Workers that could not be asked, and KV from elsewhere: nothing is stored, and the log says why."""
    with beside(place, tiny_llama, state=state, **{option: True}) as engine:
        engine.generate([LONG])
        stores.await_state(engine, "off")
        assert sentence in engine.log_text

    assert {} == place.blobs()


def test_the_direct_path_refuses_to_start_beside_another(place: Place, tiny_llama: Path) -> None:
    """VLLM would fail requests whose load fails there, and nothing tells who loaded what."""
    ours = {"mode": "direct", "cpu_bytes_to_use": None}
    with pytest.raises(EngineError, match="mode=direct cannot run inside MultiConnector"):
        beside(place, tiny_llama, state="on", ours=ours)
