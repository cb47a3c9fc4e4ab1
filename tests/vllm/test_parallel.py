"""Several workers on one engine: what they store together, the next such engine loads."""

from pathlib import Path

from prefixstore.blob.header import HEADER_BYTES
from tests.vllm import stores
from tests.vllm.stores import FLOAT32, LONG, Place

WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""One core for each worker's computation."""
SHARING = (*LONG[:896], *stores.tokens(2, 100))


def test_two_workers_store_together_and_their_next_engine_loads(
    place: Place, tiny_llama: Path
) -> None:
    """Each worker brings its share of a chunk; a chunk comes back whole, and answers the same."""
    llm = {**FLOAT32, "tensor_parallel_size": 2}
    with place.engine(tiny_llama, llm=llm, env=WORKERS, multiprocess=True) as engine:
        (cold,) = engine.generate([LONG], logprobs=1)
        place.await_blobs(13)
    with place.engine(tiny_llama, llm=llm, env=WORKERS, multiprocess=True) as engine:
        warm, sharing = engine.generate_each([LONG, SHARING], logprobs=1)
        misses = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        assert {} == stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert {} == misses
    assert [0, 13, 7] == stores.cached_chunks([cold, warm, sharing])
    assert stores.outputs([cold]) == stores.outputs([warm])
    sizes = {blob.stat().st_size for blob in place.blobs().values()}
    assert {stores.TINY_CHUNK_BYTES + HEADER_BYTES} == sizes, "both workers' shares"
