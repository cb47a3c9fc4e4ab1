"""What the store does where an engine's weights are more, or become other, than its namespace says."""

from pathlib import Path

import pytest

from tests.vllm import stores
from tests.vllm.adapters import make_adapter
from tests.vllm.conftest import NewPlace, StartWithFiles
from tests.vllm.stores import FLOAT32, LONG, PROMPT_CHUNKS, Place, Reference


def count_blobs(place: Place) -> int:
    """Count blobs of all namespaces: keys of the same tokens are the same in each."""
    return len(list(place.root.glob("ns/*/*/*/*.kv")))


# What torch says while it is imported here is not ours.
pytestmark = pytest.mark.filterwarnings("default")

LORA = {**FLOAT32, "enable_lora": True, "max_lora_rank": 8}
ADD = "tests.vllm.adapters:add"
CALL_WORKERS = "tests.vllm.adapters:call_workers"


def test_adapters_pass_the_store_by_and_a_reset_turns_it_off(
    filled: Place, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """Nothing of an adapter's is stored, while the base model hits.

    After the reset that follows a weight update nothing is loaded or stored any more.
    """
    with filled.engine(tiny_llama, llm=LORA) as engine:
        path = make_adapter(tmp_path / "adapter", seed=1)
        adapter = {"name": "adapter", "id": 1, "path": str(path)}
        (adapted,) = engine.generate([LONG], lora=adapter)
        (base,) = engine.generate([LONG])
        assert engine.reset_prefix_cache(reset_connector=True)
        after = engine.generate([LONG, stores.tokens(400, 300)])
        state = stores.state_of(engine)
        assert "Restart the engine" in engine.log_text

    assert [0, 13] == stores.cached_chunks([adapted, base])
    assert base.token_ids != adapted.token_ids
    assert alone.cold[0].token_ids == base.token_ids == after[0].token_ids
    assert [0, 0] == stores.cached_chunks(after)
    assert "off" == state
    assert stores.CHUNKS == count_blobs(filled)


def test_adapters_are_shared_by_content_and_a_replaced_one_misses_where_vllms_own_tier_answers_wrong(
    new_place: NewPlace, tiny_llama: Path, start_with_files: StartWithFiles, tmp_path: Path
) -> None:
    """With `adapters=content` the next engine hits; other weights under name and path compute anew.

    Loaded beforehand, as `--lora-modules` has it, even an engine's first request hits. Base model and
    adapter do not mix.
    """
    place = new_place(adapters="content")
    path = make_adapter(tmp_path / "adapter", seed=1)
    adapter = {"name": "adapter", "id": 1, "path": str(path)}
    with place.engine(tiny_llama, llm=LORA) as engine:
        (cold,) = engine.generate([LONG], lora=adapter)
        (base,) = engine.generate([LONG])
        place.await_blobs(2 * PROMPT_CHUNKS[0])
    with place.engine(tiny_llama, llm=LORA) as engine:
        assert engine.call(ADD, lora=adapter)
        (warm,) = engine.generate([LONG], lora=adapter)
        (warm_base,) = engine.generate([LONG])
    with start_with_files(tiny_llama, LORA) as engine:
        engine.generate([LONG], lora=adapter)
        start_with_files.await_files(13)
    make_adapter(path, seed=2)
    with start_with_files(tiny_llama, LORA) as engine:
        (wrong,) = engine.generate([LONG], lora=adapter)
    with place.engine(tiny_llama, llm=LORA) as engine:
        assert engine.call(ADD, lora=adapter)
        (replaced,) = engine.generate([LONG], lora=adapter)

    assert [0, 0] == stores.cached_chunks([cold, base])
    assert [13, 13] == stores.cached_chunks([warm, warm_base])
    assert cold.token_ids == warm.token_ids
    assert base.token_ids == warm_base.token_ids
    assert [0, 13] == stores.cached_chunks([replaced, wrong])
    assert 4 == len({answer.token_ids for answer in (cold, base, replaced, wrong)})


def test_a_call_that_may_replace_weights_turns_the_store_off(
    filled: Place, tiny_llama: Path
) -> None:
    """`collective_rpc` may reach anything in a worker; methods that only read leave the store on."""
    with filled.engine(tiny_llama) as engine:
        assert 1 == engine.call(CALL_WORKERS, method="check_health")
        before = stores.state_of(engine)
        assert 1 == engine.call(CALL_WORKERS, method="reload_weights")
        (after,) = engine.generate([LONG])
        state = stores.state_of(engine)
        assert "'reload_weights' of the workers, which may have replaced" in engine.log_text

    assert ("on", "off") == (before, state)
    assert [0] == stores.cached_chunks([after])
