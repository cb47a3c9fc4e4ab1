"""What the direct path serves: only what was proved, everything else refused with a sentence.

Also how ``buffers_bytes`` is divided, and the namespace's field that keeps this path's blobs apart from
those of the tier: both know nothing but configuration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec

from prefixstore.errors import InvalidError
from prefixstore.tree.buffer import Buffer
from prefixstore.vllm.direct.ring import stride_bytes
from prefixstore.vllm.direct.scheduler import ChunkShape
from prefixstore.vllm.shapes import check_pooling

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from prefixstore.ioproc.jobs import Limits
    from prefixstore.vllm.direct.pages import Pages
    from prefixstore.vllm.options import TierOptions

__all__ = [
    "Memory",
    "check_alone",
    "check_topology",
    "chunk_shape",
    "divide_memory",
    "layout_field",
]

LAYOUT_SCHEME = 1
"""Version of the payload's order (``prefixstore.vllm.direct.pages``)."""

BUFFERS_MAX = 64
"""As many are in flight in the tier; more would only wait for the disk in another place."""

BUFFERS_MIN = 2
"""One on its way in, one on its way out."""


def check_topology(config: "VllmConfig") -> None:
    """Refuse engines that could not be served, or whose parts were never tried.

    Raises:
        InvalidError: Names what is not served.
    """
    check_pooling(config.model_config)
    parallel = config.parallel_config
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
    }
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


def chunk_shape(caches: "KVCacheConfig", *, blocks: int) -> ChunkShape:
    """Return the shape of a chunk of ``blocks`` blocks.

    Raises:
        InvalidError: The model has other KV than one group of full attention.
    """
    groups = caches.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    spec = groups[0].kv_cache_spec
    limits = [getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if len(groups) != 1 or type(spec) is not FullAttentionSpec or any(limits):
        raise InvalidError(
            "mode=direct serves models with one KV group of full attention; this one has "
            f"{len(groups)} of {', '.join(kinds)}: use mode=tier"
        )
    tokens_per_hash = caches.hash_block_size or spec.block_size
    if spec.block_size * blocks % tokens_per_hash:
        raise InvalidError(
            f"mode=direct: a chunk of {spec.block_size * blocks} tokens is no whole number of hashes "
            f"of {tokens_per_hash}: use another blocks_per_chunk, or mode=tier"
        )
    return ChunkShape(
        tokens_per_hash=tokens_per_hash, tokens_per_block=spec.block_size, blocks=blocks
    )


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


def layout_field(pages: "Pages", *, rank: int, ranks: int) -> dict[str, object]:
    """Return the namespace field that only blobs of this path have: the order, and whose part it is."""
    return {
        "mode": "direct",
        "scheme": LAYOUT_SCHEME,
        "part": [rank, ranks],
        "page_bytes": list(pages.page_bytes),
        "blocks_per_chunk": pages.blocks_per_chunk,
    }
