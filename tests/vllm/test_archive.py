"""What one engine stored answers for another on a root that only an archive has reached."""

from pathlib import Path

import pytest

from prefixstore.cli.main import run
from tests.vllm import stores
from tests.vllm.conftest import NewPlace
from tests.vllm.stores import PROMPT_CHUNKS, PROMPTS, Place, Reference


@pytest.mark.filterwarnings("default")
def test_an_exported_root_serves_where_it_is_imported_and_may_be_removed_beneath(
    filled: Place,
    new_place: NewPlace,
    tiny_llama: Path,
    alone: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every chunk hits on the other root; when all are removed there, the engine serves on."""
    monkeypatch.setenv("XDG_CACHE_HOME", f"{filled.root}-index")
    archive = f"{filled.root}.pfx"
    other = new_place(root=filled.root.with_name("other"))
    codes = [
        run(["export", "--root", str(filled.root), archive]),
        run(["init", str(other.root)]),
        run(["import", "--root", str(other.root), archive]),
    ]
    with other.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS, logprobs=1)
        (namespace,) = (path.name for path in (other.root / "ns").iterdir())
        codes.append(run(["rm", str(other.root), "--namespace", namespace, "--yes"]))
        removed = len(other.blobs())
        engine.reset_prefix_cache()
        again = engine.generate_each(PROMPTS)
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert codes == [0] * 4
    assert stores.cached_chunks(warm) == list(PROMPT_CHUNKS)
    assert stores.logprobs(warm) == stores.logprobs(alone.own_hit)
    assert removed == 0
    assert stores.outputs(again) == stores.outputs(alone.cold)
    assert failures == {}
