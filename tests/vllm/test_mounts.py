"""What happens to the root and to the index beneath a running engine, and how it heals."""

import os
import subprocess
from pathlib import Path

from tests.vllm import stores
from tests.vllm.conftest import NewPlace
from tests.vllm.stores import FORKED, LONG, OTHER, PROMPTS, Place, Reference


def test_a_read_only_mount_serves_hits_and_stores_nothing(
    filled: Place, new_place: NewPlace, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """An engine that may only read says so, loads what is there, and skips what is new."""
    mount = tmp_path / "mounted"
    mount.mkdir()
    subprocess.run(["mount", "--bind", str(filled.root), str(mount)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(mount)], check=True)
        reader = new_place(root=mount)
        with reader.engine(tiny_llama, state="read_only") as engine:
            warm = engine.generate_each(PROMPTS)
            engine.generate([stores.tokens(500, 300)])
            stores.await_state(engine, "read_only")
            skipped = stores.labelled(engine, "vllm:prefixstore_stores_skipped", "reason")
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)

    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm)
    assert {"read_only": 2} == skipped
    assert stores.CHUNKS == len(filled.blobs())


def test_an_index_damaged_and_a_root_gone_for_a_while_cost_no_answer(
    filled: Place, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """The I/O process may die of the one; the other is missed; each time the same engine's store is back."""
    with filled.engine(tiny_llama) as engine:
        (data,) = filled.cache.rglob("data.mdb")
        with data.open("r+b") as file:
            file.write(os.urandom(data.stat().st_size))
        overwritten = engine.generate([OTHER])
        stores.await_state(engine, "on")
        (data,) = filled.cache.rglob("data.mdb")
        os.truncate(data, 0)
        truncated = engine.generate([FORKED])
        stores.await_state(engine, "on")

        filled.root.rename(tmp_path / "away")
        engine.generate([stores.tokens(501, 300)])
        (tmp_path / "away").rename(filled.root)
        stores.await_state(engine, "on")
        back = engine.generate([LONG])
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert {} == failures
    assert [13] == stores.cached_chunks(back)
    assert stores.outputs(alone.cold) == stores.outputs([*back, *truncated, *overwritten])
    with filled.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)
    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm)
