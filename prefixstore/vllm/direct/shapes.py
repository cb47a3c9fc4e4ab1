"""What the direct path serves: only what was proved, everything else refused with a sentence.

Also how ``buffers_bytes`` is divided, and the namespace's field that keeps this path's blobs apart from
those of the tier: both know nothing but configuration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from prefixstore.errors import InvalidError
from prefixstore.tree.buffer import Buffer
from prefixstore.vllm.direct.chunks import ChunkShape, chunk_step
from prefixstore.vllm.direct.ring import stride_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from prefixstore.ioproc.jobs import Limits
    from prefixstore.vllm.direct.pages import Pages
    from prefixstore.vllm.options import TierOptions

__all__ = [
    "Memory",
    "check_alone",
    "check_topology",
    "chunk_shapes",
    "divide_memory",
    "keep_interval",
    "layout_field",
]

LAYOUT_SCHEME = 2
"""Version of the payload's order (``prefixstore.vllm.direct.pages``) and of the field that tells it."""

BUFFERS_MAX = 64
"""As many are in flight in the tier; more would only wait for the disk in another place."""

BUFFERS_MIN = 2
"""One on its way in, one on its way out."""


def check_topology(config: "VllmConfig") -> None:
    """Refuse engines that could not be served, or whose parts were never tried.

    Raises:
        InvalidError: Names what is not served.
    """
    parallel = config.parallel_config
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
    }
    if parallel.distributed_executor_backend == "external_launcher":
        raise InvalidError(
            "mode=direct: with external_launcher each process schedules for itself, and what a store "
            "answers in time would make them differ: run it without prefixstore"
        )
    for name, size in sizes.items():
        if size != 1:
            raise InvalidError(
                f"mode=direct serves tensor parallelism only, not {name}={size}: use mode=tier"
            )
    if config.model_config.is_multimodal_model:
        raise InvalidError("mode=direct was not tried with multimodal models: use mode=tier")


def check_alone(engine: "VllmConfig | None") -> None:
    """Refuse to run inside another connector.

    Args:
        engine: The engine's own config, where it is known: in workers. A connector inside another is given a
            copy with its own options.

    Raises:
        InvalidError: Inside another connector.
    """
    transfer = engine.kv_transfer_config if engine is not None else None
    if transfer is not None and transfer.kv_connector != "PrefixStoreConnector":
        raise InvalidError(
            f"mode=direct cannot run inside {transfer.kv_connector}: a load that fails there fails its "
            "request, and KV that another connector loaded could not be told from computed KV. Use "
            "mode=tier"
        )


def chunk_shapes(caches: "KVCacheConfig", *, blocks: int) -> tuple[ChunkShape, ...]:
    """Return the shape of a chunk of ``blocks`` blocks in each KV group.

    Raises:
        InvalidError: The model has other KV than full attention and sliding windows.
    """
    shapes = tuple(
        _chunk_shape(group.kv_cache_spec, number, caches.hash_block_size, blocks=blocks)
        for number, group in enumerate(caches.kv_cache_groups)
    )
    if getattr(caches, "needs_kv_cache_zeroing", False):
        # A step would zero blocks that are handed on before it lets us wait for a copy out of them.
        raise InvalidError(
            "mode=direct was never tried with KV that vLLM zeroes before use (states, groups of mixed "
            "precision): use mode=tier"
        )
    return shapes


def _chunk_shape(
    spec: "KVCacheSpec", group: int, tokens_per_hash: int | None, *, blocks: int
) -> ChunkShape:
    window = None
    if type(spec) is SlidingWindowSpec:
        window = spec.sliding_window + spec.extra_retained_tokens
    elif type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
        raise InvalidError(
            "mode=direct serves KV groups of full attention and of sliding windows; this model has "
            f"one of {type(spec).__name__}{_limits(spec)}: use mode=tier"
        )
    if tokens_per_hash not in (None, spec.block_size):
        # vLLM may then hit a part of a block, and copies it before it lets us wait for a copy of ours.
        raise InvalidError(
            f"mode=direct was never tried with blocks of {spec.block_size} tokens that are hashed every "
            f"{tokens_per_hash}: use one --block-size for all groups, or mode=tier"
        )
    return ChunkShape(
        tokens_per_hash=spec.block_size,
        tokens_per_block=spec.block_size,
        blocks=blocks,
        group=group,
        window=window,
    )


def _limits(spec: "KVCacheSpec") -> str:
    """Name what a group of full attention does not see, where windows have no group of their own."""
    found = [
        f"{name}={value}"
        for name in ("sliding_window", "attention_chunk_size")
        if (value := getattr(spec, name, None))
    ]
    return f" with {', '.join(found)}" if found else ""


def keep_interval(shapes: "Sequence[ChunkShape]", retention: int | None) -> int:
    """Return every how many tokens windows are kept; 0: only where prompts end.

    Args:
        shapes: Of each group.
        retention: vLLM's ``prefix_cache_retention_interval``; None: everywhere.
    """
    return chunk_step(shapes) if retention is None else retention


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How one worker's ``buffers_bytes`` is divided.

    Attributes:
        ring_bytes: The staging ring, that the device copies from and to.
        limits: The I/O client's, its buffers among them.
    """

    ring_bytes: int
    limits: "Limits"


def divide_memory(options: "TierOptions", payload_bytes: int) -> Memory:
    """Give half to the ring and half to the I/O process's buffers; together never more.

    Raises:
        InvalidError: There is no room for two chunks on either side.
    """
    half = options.buffers_bytes // 2
    slot_bytes, image_bytes = stride_bytes(payload_bytes), Buffer.image_bytes(payload_bytes)
    slots = min(half // slot_bytes, BUFFERS_MAX)
    images = min(half // image_bytes, BUFFERS_MAX)
    if min(slots, images) < BUFFERS_MIN:
        raise InvalidError(
            f"buffers_bytes={options.buffers_bytes} is too little for mode=direct: each worker stages "
            f"at least 2 chunks of {payload_bytes} bytes on either side of its ring: set it to "
            f"{2 * BUFFERS_MIN * image_bytes} or more"
        )
    limits = options.limits(payload_bytes, buffer_count=images)
    return Memory(ring_bytes=slots * slot_bytes, limits=limits)


def layout_field(pages: "Sequence[Pages]", *, rank: int, ranks: int) -> dict[str, object]:
    """Return the namespace field that only blobs of this path have: the order, and whose part it is."""
    return {
        "mode": "direct",
        "scheme": LAYOUT_SCHEME,
        "part": [rank, ranks],
        "page_bytes": [list(group.page_bytes) for group in pages],
        "blocks_per_chunk": pages[0].blocks_per_chunk,
    }
