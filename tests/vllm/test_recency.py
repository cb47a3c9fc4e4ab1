"""A prefix that only the engine's own cache serves is in use: eviction must know it."""

import shutil
import time
from pathlib import Path

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from tests.vllm import stores
from tests.vllm.stores import BLOCK_TOKENS, Place

HOT = stores.tokens(300, 4 * BLOCK_TOKENS + 10)
COLDER = [stores.tokens(301 + i, 3 * BLOCK_TOKENS + 10) for i in range(8)]
CHUNKS = 4 + 8 * 3


def keys_of(place: Place) -> set[str]:
    """Return the keys of all published blobs."""
    return set(place.blobs())


def evict_half(root: Path, *, index_dir: Path) -> None:
    """Evict half of a root's bytes, as `prefixstore gc` does."""
    used = sum(blob.stat().st_size for blob in root.glob("ns/*/*/*/*.kv"))
    config = StoreConfig(index_dir=str(index_dir))
    with PrefixStore.open(str(root), config=config, create=False) as store:
        report = store.evict(used // 2)
    assert not report.errors
    assert report.evicted_chunks >= CHUNKS // 2


def test_a_hot_prefix_in_the_engines_cache_survives_eviction(
    place: Place, tiny_llama: Path, tmp_path: Path
) -> None:
    """A prompt that the engine answers from its memory again and again outlives colder ones.

    Both on this machine, whose index knows of each use, and on another, which sees only the times
    of the files.
    """
    with place.engine(tiny_llama, options={"touch_interval_s": 0.0}) as engine:
        engine.generate([HOT], max_tokens=4)
        hot = set(place.await_blobs(4))
        for prompt in COLDER:
            engine.generate([prompt], max_tokens=4)
            (answer,) = engine.generate([HOT], max_tokens=4)
            assert [4] == stores.cached_chunks([answer])
        queries = stores.labelled(engine, "vllm:kv_offload_tiering_chunk_queries", "tier")
        # Recency is kept in seconds: the last use of HOT falls into one of its own.
        place.await_blobs(CHUNKS)
        time.sleep(2.1)
        engine.generate([HOT], max_tokens=4)
        assert queries == stores.labelled(engine, "vllm:kv_offload_tiering_chunk_queries", "tier")
        # Touches are written in the background.
        newest = max(blob.stat().st_mtime for key, blob in place.blobs().items() if key not in hot)
        stores.until(
            lambda: all(place.blobs()[key].stat().st_mtime > newest for key in hot),
            "the files of the hot prefix to be touched",
        )
        elsewhere = Place(root=tmp_path / "copy", cache=tmp_path / "elsewhere", start=place.start)
        shutil.copytree(place.root, elsewhere.root)
        evict_half(place.root, index_dir=place.cache / "prefixstore" / "index")
        evict_half(elsewhere.root, index_dir=elsewhere.cache)

        assert hot <= keys_of(place)
        assert hot <= keys_of(elsewhere)
        assert CHUNKS // 2 >= len(keys_of(place))
        assert chains_are_whole(place)
        assert chains_are_whole(elsewhere)
        (answer,) = engine.generate([COLDER[0]], max_tokens=4)
        assert 4 == len(answer.token_ids), "an engine whose chunks were evicted serves on"


def chains_are_whole(place: Place) -> bool:
    """Whether no blob's parent is missing: leaves go first."""
    headers = [stores.header_of(blob) for blob in place.blobs().values()]
    keys = {bytes(header.key) for header in headers}
    return all(header.parent is None or bytes(header.parent) in keys for header in headers)
