"""A real engine in bad surroundings: it starts, answers the same, and heals where it can."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm import stores
from tests.vllm.stores import LONG, OTHER, PROMPTS, Place, Reference


def test_a_root_that_cannot_be_made_leaves_the_store_off_until_it_can(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """With a file in the way the engine serves without a store, and with one once it is gone."""
    place.root.write_text("in the way")
    with place.engine(tiny_llama, state="off") as engine:
        without = engine.generate([LONG])
        place.root.unlink()
        stores.await_state(engine, "on", patience_s=60)
        engine.generate([OTHER])

        def all_stored() -> bool:
            engine.generate([[5]], max_tokens=2)  # Offers are made while an engine steps.
            return len(place.blobs()) == 13 + 3

        # What was skipped lies in vLLM's CPU tier, and is offered again.
        stores.until(all_stored, "the chunks of both prompts", patience_s=60)

    assert alone.cold[0].token_ids == without[0].token_ids


def test_an_io_process_that_is_killed_again_and_again_costs_hits_only(
    filled: Place, tiny_llama: Path, alone: Reference
) -> None:
    """Each request meets a dead or a fresh I/O process; all are answered the same."""
    with filled.engine(tiny_llama) as engine:
        last = None
        answers = []
        for _ in range(3):
            last = stores.await_io_process(engine, other_than=last)
            stores.kill(last)
            answers.append(engine.generate_each(PROMPTS))
            assert engine.reset_prefix_cache()
        stores.await_state(engine, "on")
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert {} == failures
    assert [stores.outputs(alone.cold)] * 3 == [stores.outputs(answer) for answer in answers]


def test_a_damaged_index_is_thrown_away(filled: Place, tiny_llama: Path, alone: Reference) -> None:
    """Junk where the index was kills no engine and hides no chunk."""
    with filled.engine(tiny_llama) as engine:
        engine.generate_each(PROMPTS)
    (data,) = filled.cache.rglob("data.mdb")
    size = data.stat().st_size
    data.write_bytes(os.urandom(size))

    with filled.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)

    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm)


def test_a_full_disk_stops_stores_and_nothing_else(
    place: Place, tiny_llama: Path, alone: Reference
) -> None:
    """On a root with room for a few chunks the rest is skipped with its reason; hits go on."""
    place.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place.root)], check=True)
    try:
        with place.engine(tiny_llama) as engine:
            cold = engine.generate_each(PROMPTS)
            stores.until(lambda: len(place.blobs()) >= 6, "the disk to be full")
            stores.await_state(engine, "on")
            skipped = stores.labelled(engine, "vllm:prefixstore_stores_skipped", "reason")
        with place.engine(tiny_llama) as engine:
            warm = engine.generate_each(PROMPTS)
    finally:
        subprocess.run(["umount", "-l", str(place.root)], check=True)

    assert {"full"} <= skipped.keys() <= {"full", "paused"}
    assert 0 < warm[0].cached_tokens
    assert stores.outputs(alone.cold) == stores.outputs(cold) == stores.outputs(warm)


def test_a_root_that_vanishes_is_missed_and_not_made_anew(
    filled: Place, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """With the root moved away every chunk is computed; put back, it hits again."""
    with filled.engine(tiny_llama) as engine:
        filled.root.rename(tmp_path / "away")
        gone = engine.generate_each(PROMPTS)
        assert not filled.root.exists()
        (tmp_path / "away").rename(filled.root)

    with filled.engine(tiny_llama) as engine:
        back = engine.generate_each(PROMPTS)

    assert stores.outputs(alone.cold) == stores.outputs(gone) == stores.outputs(back)
    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(back)


def test_a_random_hash_seed_turns_the_store_off_with_a_sentence(
    place: Place, tiny_llama: Path
) -> None:
    """Keys that no other process can find again are not worth storing."""
    with place.engine(
        tiny_llama,
        llm={**stores.FLOAT32, "prefix_caching_hash_algo": "xxhash"},
        state="off",
    ) as engine:
        engine.generate([LONG])
        assert "set PYTHONHASHSEED" in engine.log_text

    assert {} == place.blobs()


def test_a_misspelt_option_refuses_to_start(place: Place, tiny_llama: Path) -> None:
    """The engine does not come up with an option that would silently do nothing."""
    with pytest.raises(AssertionError, match="unknown field `durabilty`"):
        place.engine(tiny_llama, options={"durabilty": "data"})
