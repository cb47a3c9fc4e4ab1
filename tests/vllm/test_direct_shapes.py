"""What the direct path refuses, on vLLM's own specifications, and what keeps its blobs apart."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from prefixstore.errors import InvalidError
from prefixstore.keys import namespace_id
from prefixstore.vllm.direct.pages import Pages, Region
from prefixstore.vllm.direct.shapes import (
    check_topology,
    chunk_shapes,
    divide_memory,
    keep_interval,
    layout_field,
)
from prefixstore.vllm.options import TierOptions

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
SIZES = ("pipeline", "prefill_context", "decode_context", "data", "tensor")


def caches(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec(layer_names=[f"l{n}"], kv_cache_spec=s) for n, s in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


def config(*, multimodal: bool = False, launcher: str = "mp", **sizes: int) -> Any:
    parallel: dict[str, Any] = {f"{name}_parallel_size": sizes.get(name, 1) for name in SIZES}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel, distributed_executor_backend=launcher),
        model_config=SimpleNamespace(is_multimodal_model=multimodal, runner_type="generate"),
    )


WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (
            MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32),
            "MLAAttentionSpec",
        ),
        (
            FullAttentionSpec(
                block_size=16,
                num_kv_heads=2,
                head_size=64,
                dtype=torch.float32,
                sliding_window=64,
            ),
            "FullAttentionSpec with sliding_window=64",
        ),
        (
            MambaSpec(block_size=16, shapes=((2, 8),), dtypes=(torch.float32,)),
            "MambaSpec",
        ),
    ],
)
def test_other_kv_than_full_attention_and_windows_is_refused(spec: Any, found: str) -> None:
    """Beside a group that is served, too; each names what it found, and the mode that serves it."""
    with pytest.raises(InvalidError, match=f"this model has one of {found}: use mode=tier"):
        chunk_shapes(caches(FULL, spec), blocks=1)


def test_groups_of_mixed_precision_are_refused() -> None:
    """VLLM zeroes their blocks before it lets anybody wait for a copy out of them."""
    other = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(InvalidError, match="zeroes before use"):
        chunk_shapes(caches(FULL, other), blocks=1)


def test_groups_have_shapes() -> None:
    """A chunk has as many tokens and hashes as vLLM says, and a window its own reach."""
    (full,) = chunk_shapes(caches(FULL), blocks=4)
    both = chunk_shapes(caches(FULL, WINDOW), blocks=1)

    assert (64, 4, 16, 0, None) == (
        full.tokens, full.hashes, full.tokens_per_hash, full.group, full.window,
    )  # fmt: skip
    assert [(0, None), (1, 64)] == [(shape.group, shape.window) for shape in both]
    assert [16, 0, 256] == [keep_interval(both, retention) for retention in (None, 0, 256)]


@pytest.mark.parametrize("name", ["pipeline", "prefill_context", "decode_context", "data"])
def test_other_parallelism_is_refused(name: str) -> None:
    """Only tensor parallelism was tried."""
    with pytest.raises(InvalidError, match=f"{name}.*=2: use mode=tier"):
        check_topology(config(**{name: 2}))


def test_tensor_parallelism_is_served_and_pictures_are_not() -> None:
    """Two ranks pass; a multimodal model does not."""
    check_topology(config(tensor=2))
    with pytest.raises(InvalidError, match="multimodal"):
        check_topology(config(multimodal=True))


def test_processes_that_schedule_for_themselves_are_refused() -> None:
    """What a store answers in time would make them differ."""
    with pytest.raises(InvalidError, match="external_launcher"):
        check_topology(config(tensor=2, launcher="external_launcher"))


@pytest.mark.parametrize("buffers_bytes", [2**20, 3 * 2**20, 2**28])
def test_staging_memory_is_never_more_than_configured(buffers_bytes: int) -> None:
    """Ring and I/O buffers together stay within the option; no room for two chunks is refused."""
    options = TierOptions(root="/kv", buffers_bytes=buffers_bytes)
    memory = divide_memory(options, 100_000)
    buffers = memory.limits.buffer_count * (100_000 + 4096)

    assert memory.ring_bytes + buffers <= buffers_bytes
    assert min(memory.ring_bytes // 100_000, memory.limits.buffer_count) >= 2
    least = re.escape("set it to ")
    with pytest.raises(InvalidError, match=least):
        divide_memory(options, buffers_bytes // 3)


def test_blobs_of_another_mode_or_rank_have_another_namespace() -> None:
    """With everything else equal, tier, rank 0, rank 1, and rank 0 of one are four namespaces."""
    region = Region(address=0, stride_bytes=64, page_bytes=64, blocks=8)
    pages = Pages([region], blocks_per_chunk=1)
    fields = {"weights": "w", "topology": {"tensor": 2}}
    parts = [(0, 2), (1, 2), (0, 1)]
    namespaces = {
        namespace_id({**fields, "layout": layout_field([pages], rank=rank, ranks=ranks)})
        for rank, ranks in parts
    } | {namespace_id(fields)}

    assert 4 == len(namespaces)
