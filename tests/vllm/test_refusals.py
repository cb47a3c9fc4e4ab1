"""What cannot be served right is refused before it serves, from real configs and without an engine."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    get_sliding_window_size_in_chunks,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_coordinator import _validate_prefix_cache_retention_interval
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    HiSparseHotSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from prefixstore.errors import InvalidError
from prefixstore.vllm.shapes import (
    Boundaries,
    GroupShape,
    check_shape,
    choose_interval,
    describe_groups,
    describe_reaches,
    keep_windows,
    name_unseen,
    stored_bytes,
)

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=1024
)

LOCAL = ChunkedLocalAttentionSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, attention_chunk_size=256
)


def caches(*specs: Any) -> KVCacheConfig:
    """Give groups of two layers each."""
    return KVCacheConfig(
        num_blocks=10,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"{i}a", f"{i}b"], spec) for i, spec in enumerate(specs)
        ],
    )


def config(**changed: Any) -> Any:
    """Give the parts of a config that a shape is judged by."""
    values = {
        "is_encoder_decoder": False,
        "is_prefix_caching_supported": True,
        "runner_type": "generate",
        "use_mla": False,
        "enable_prefix_caching": True,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "options": {},
        **changed,
    }
    part = SimpleNamespace(**values)
    transfer = SimpleNamespace(kv_connector_extra_config=values["options"])
    return SimpleNamespace(
        model_config=part, parallel_config=part, cache_config=part, kv_transfer_config=transfer
    )


@pytest.mark.parametrize(
    ("changed", "specs", "sentence"),
    [
        (
            {"runner_type": "pooling", "is_prefix_caching_supported": False},
            (FULL,),
            "every token of a prompt",
        ),
        ({"is_encoder_decoder": True}, (FULL,), "encoder-decoder"),
        ({"decode_context_parallel_size": 2}, (FULL,), "context parallel"),
        ({"prefill_context_parallel_size": 2}, (FULL,), "context parallel"),
        ({"pipeline_parallel_size": 2}, (FULL,), "pipeline parallel"),
        ({"use_mla": True, "enable_prefix_caching": False}, (FULL,), "latent attention"),
        ({"enable_prefix_caching": False}, (FULL, WINDOW), "several KV groups"),
        ({"options": {"blocks_per_chunk": 2}}, (FULL, WINDOW), "blocks_per_chunk=2"),
        ({"options": {"block_size": 32}}, (WINDOW,), "blocks_per_chunk=2"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    changed: dict[str, Any], specs: tuple[Any, ...], sentence: str
) -> None:
    """Each refusal says what the matter is and what to do."""
    check_shape(config(), caches(*specs))
    check_shape(config(options={"blocks_per_chunk": 2}), caches(FULL))
    with pytest.raises(InvalidError, match=sentence):
        check_shape(config(**changed), caches(*specs))


@dataclass(frozen=True, kw_only=True)
class StrangeSpec(AttentionSpec):
    """A kind of KV that nobody has told prefixstore of."""


@pytest.mark.parametrize("beside", [(), (FULL,), (FULL, WINDOW)])
def test_a_new_kind_of_kv_is_refused_whatever_lies_beside_it(beside: tuple[Any, ...]) -> None:
    """What a prefix of it needs is not known, so a hit could lack some of that."""
    strange = StrangeSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(InvalidError, match="StrangeSpec is new to prefixstore"):
        check_shape(config(), caches(*beside, strange))


def test_hisparse_is_refused() -> None:
    """Its pool of host memory is another's, and a tier would see the KV of an index only."""
    pooled = caches(FULL)
    pooled.hisparse_host_num_blocks = 10
    with pytest.raises(InvalidError, match="HiSparse"):
        check_shape(config(), pooled)


def state(kind: str) -> MambaSpec:
    """Give a layer that keeps a state."""
    return MambaSpec(
        block_size=16,
        shapes=((4, 64),),
        dtypes=(torch.bfloat16,),
        mamba_type=MambaAttentionBackendEnum[kind],
        mamba_cache_mode="align",
    )


def test_states_that_differ_from_run_to_run_are_refused_where_they_do() -> None:
    """On the CPU vLLM's short convolutions depend on what memory held before; its other states do not."""
    check_shape(config(), caches(FULL, state("GDN_ATTN")))
    with pytest.raises(InvalidError, match="short convolutions"):
        check_shape(config(), caches(FULL, state("SHORT_CONV")))


@pytest.mark.parametrize(
    ("changed", "specs", "unseen"),
    [
        ({}, (FULL, WINDOW, state("GDN_ATTN")), []),
        ({}, (FULL, state("MAMBA2")), ["states of MAMBA2"]),
        ({"use_mla": True}, (FULL,), ["latent attention (MLA)"]),
        ({}, (FULL, LOCAL), ["chunked local attention"]),
    ],
)
def test_what_no_engine_was_seen_to_get_back_right_is_named(
    changed: dict[str, Any], specs: tuple[Any, ...], unseen: list[str]
) -> None:
    """It is served, since pages are stored as they are, and the log says that nobody has tried."""
    assert unseen == name_unseen(config(**changed), caches(*specs))


def test_a_kind_of_kv_that_is_new_is_refused() -> None:
    """What a prefix of it needs is not known, so nothing is promised."""
    new = CrossAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(InvalidError, match="CrossAttentionSpec is new"):
        describe_groups(caches(new), blocks_per_chunk=1)


def test_full_attention_alone_needs_no_interval() -> None:
    """VLLM would refuse one; nothing is set for such models."""
    assert choose_interval(describe_groups(caches(FULL), blocks_per_chunk=1)) is None


@pytest.mark.parametrize(
    ("windows", "expected"),
    [(1, 1024), (5, 1024), (0.25, 256), (0.5, 512)],
)
def test_windows_cost_no_more_than_full_attention_within_bounds(
    windows: float, expected: int
) -> None:
    """The interval is where a window weighs as much as the full attention in between."""
    full = GroupShape(chunk_tokens=16, chunk_bytes=1600)
    window = GroupShape(chunk_tokens=16, chunk_bytes=int(1600 * windows), window_chunks=64)
    interval = choose_interval([full, window])

    assert expected == interval
    within = stored_bytes([full, window], tokens=16_385, interval=interval)
    dense = stored_bytes([full, window], tokens=16_385, interval=16)
    assert stored_bytes([full, window], tokens=16_385, interval=None) < within <= dense


def retention_of(found: KVCacheConfig, *, step: int) -> int:
    """Return the interval that windows of a model are kept at, once vLLM has accepted it."""
    engine = config(prefix_cache_retention_interval=0, max_model_len=4096, block_size=step)
    keep_windows(engine, found)
    interval = found.prefix_cache_retention_interval or 0
    _validate_prefix_cache_retention_interval(interval, step, found)
    return interval


def test_chunked_local_attention_gets_no_interval() -> None:
    """VLLM keeps it whole, and refuses to start with an interval where nothing else is sparse."""
    assert 0 == retention_of(caches(FULL, LOCAL), step=16)
    assert 0 == retention_of(caches(FULL), step=16)
    assert 256 <= retention_of(caches(FULL, LOCAL, WINDOW), step=16) <= 1024


def test_an_interval_is_a_multiple_of_the_blocks_of_all_groups() -> None:
    """Those of groups that nobody shares, too; it may come out longer than the longest wanted."""
    apart = HiSparseHotSpec(block_size=1280, page_size=4096, blocks_per_request=1)

    assert 1280 == retention_of(caches(FULL, WINDOW, apart), step=1280)


@pytest.mark.parametrize(
    ("spec", "token", "chunks"),
    [
        (WINDOW, 4096, 64),
        (dataclasses.replace(WINDOW, sliding_window=1025), 4096, 65),
        (WINDOW, 4095, 64),
        (WINDOW, 4088, 65),
        (dataclasses.replace(WINDOW, extra_retained_tokens=16), 4096, 65),
        (LOCAL, 4096, 16),
        (LOCAL, 4088, 16),
        (state("GDN_ATTN"), 4096, 1),
    ],
)
def test_a_match_takes_at_least_what_vllm_needs_before_its_end(
    spec: Any, token: int, chunks: int
) -> None:
    """Fewer chunks than vLLM looks for in a row would be no hit, and more are loaded for nothing."""
    reach = describe_reaches(config(), caches(FULL, spec))[1]
    group = GroupOffloadConfig(
        group_idx=1,
        tokens_per_block=16,
        tokens_per_chunk=16,
        hashes_per_chunk=1,
        kv_event_group_spec=None,
        sliding_window_size_in_chunks=get_sliding_window_size_in_chunks(spec, 16),
        kv_cache_spec=spec,
        manager_cls=None,
    )

    assert chunks == reach.chunks_before(token)
    assert chunks - 1 <= group.load_window_size_in_chunks(token) <= chunks
    assert group.sliding_window_size_in_chunks <= chunks


def test_groups_are_described_by_the_bytes_that_they_own() -> None:
    """Two layers of keys and values in bfloat16; a window needs what lies before its next token."""
    full, window = describe_groups(caches(FULL, WINDOW), blocks_per_chunk=2)
    chunk_bytes = 2 * 2 * 32 * 2 * 64 * 2

    assert GroupShape(chunk_tokens=32, chunk_bytes=chunk_bytes) == full
    assert dataclasses.replace(full, window_chunks=32) == window


def test_steps_end_at_each_multiple_and_where_vllm_saw_a_prompt_part() -> None:
    """The next boundary is set when a step comes to the last one, up to the prompt's end."""
    request = SimpleNamespace(
        request_id="r", shared_prefix_boundary=700, num_computed_tokens=0, num_prompt_tokens=1500
    )
    boundaries = Boundaries(interval=512)
    boundaries.begin(request, computed_tokens=0)
    seen = [request.shared_prefix_boundary]
    while request.num_computed_tokens < 1500:
        end = min(request.shared_prefix_boundary, 1500)
        boundaries.end_step({"r": end - request.num_computed_tokens})
        request.num_computed_tokens = end
        seen.append(request.shared_prefix_boundary)

    assert [512, 700, 1024, 1536, 1536] == seen
