"""Which shapes of models can be stored, and what a prompt must leave behind for others to share it.

A group of full attention is stored whole, so any prompt that begins alike finds its beginning. A
**windowed** group (a sliding window, or the state of a recurrent layer) is needed only at the point
where a prompt goes on, and vLLM keeps it only where the stored prompt itself ended: a different prompt
that shares the beginning finds the full groups and no window, which is a miss.

So where a model has such groups, the front door has vLLM keep windows and states at an **interval**:
vLLM's own ``prefix_cache_retention_interval``, chosen by ``choose_interval`` unless the user chose it.
A state exists only where a step of the scheduler ends; ``Boundaries`` says where the next one should.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from prefixstore.errors import InvalidError
from prefixstore.vllm.compat import set_retention
from prefixstore.vllm.lookups import Reach

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = [
    "Boundaries",
    "GroupShape",
    "check_pooling",
    "check_shape",
    "choose_interval",
    "describe_groups",
    "describe_reaches",
    "keep_windows",
    "name_unseen",
    "stored_bytes",
]

logger = logging.getLogger("prefixstore")

SEEN_STATE = MambaAttentionBackendEnum.GDN_ATTN
"""The kind of state that the tests see come back right; vLLM's CPU engine runs no other."""

WINDOWED = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
"""Kinds of KV of which vLLM keeps only a part, where a prompt goes on."""

INTERVAL_SMALLEST = 256
"""Tokens. Below this a prompt gains less from a nearer boundary than its windows cost to write."""
INTERVAL_LARGEST = 1024
"""Tokens, before rounding up. A shared beginning is used to the last boundary inside it: half of this is lost
on average."""

SPARSE = (SlidingWindowSpec, MambaSpec)
"""Kinds of KV that vLLM keeps at an interval; it refuses one where there is neither. It keeps chunked local
attention whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """What one KV group costs to store, in all layers of one worker.

    Attributes:
        chunk_tokens: Tokens of one chunk.
        chunk_bytes: Bytes that a chunk owns.
        window_chunks: Chunks needed where a prompt goes on; None: all of them, from the first.
        is_state: Whether a chunk is the state after its last token, not what its tokens left.
    """

    chunk_tokens: int
    chunk_bytes: int
    window_chunks: int | None = None
    is_state: bool = False


def check_pooling(model: Any) -> None:
    """Refuse a model whose answer needs every token of the prompt computed.

    vLLM turns its own prefix caching off for it, but asks connectors all the same, and a pooler that sees
    less than the whole prompt ends the engine.

    Raises:
        InvalidError: It pools over the prompt (MEAN, CLS, STEP) instead of taking its end.
    """
    if model.runner_type == "pooling" and not model.is_prefix_caching_supported:
        raise InvalidError(
            "prefixstore: this model's pooling needs every token of a prompt computed (its pooler is "
            "none that takes the last token), so no prefix could be used; run it without prefixstore"
        )


def check_shape(config: "VllmConfig", caches: "KVCacheConfig") -> None:
    """Refuse a model or a way of running it that could not be served right.

    Raises:
        InvalidError: It would not work, or was never shown to.
    """
    model, parallel = config.model_config, config.parallel_config
    check_pooling(model)
    if model.is_encoder_decoder:
        raise InvalidError(
            "prefixstore: an encoder-decoder model's KV depends on what its encoder saw, which block "
            "hashes do not tell; run it without prefixstore"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise InvalidError(
            "prefixstore: context parallel (decode_context_parallel_size, "
            "prefill_context_parallel_size) spreads one block's tokens over workers and was never "
            "tried with prefixstore; use tensor parallel, or run without prefixstore"
        )
    if parallel.pipeline_parallel_size > 1:
        raise InvalidError(
            "prefixstore: pipeline parallel (pipeline_parallel_size) was never shown to work with "
            "prefixstore; use tensor parallel, or run without prefixstore"
        )
    groups = caches.kv_cache_groups
    specs = [spec for group in groups for spec in _layer_specs(group.kv_cache_spec)]
    if getattr(caches, "hisparse_host_num_blocks", None) is not None:
        raise InvalidError(
            "prefixstore: HiSparse keeps KV in a pool of host memory that vLLM's offloading leaves alone, and "
            "was never tried with prefixstore; run without one of them"
        )
    if not any(spec.prefix_cacheable for spec in specs):
        raise InvalidError(
            "prefixstore: this model keeps nothing that another request could use (no KV cache that "
            "vLLM can share); run it without prefixstore"
        )
    blocks_per_chunk = _blocks_per_chunk(config, caches)
    if blocks_per_chunk > 1 and any(isinstance(spec, WINDOWED) for spec in specs):
        # A chunk whose first blocks have left the window comes without them, and vLLM's account of a
        # transfer can say so for the first chunk only: the others' blocks land in the wrong places.
        raise InvalidError(
            f"prefixstore: blocks_per_chunk={blocks_per_chunk} on a model with sliding windows or "
            "states, whose chunks vLLM may store in part and load wrongly; use blocks_per_chunk=1, "
            "the default"
        )
    if not config.cache_config.enable_prefix_caching and model.use_mla:
        # vLLM's CPU build does so by itself (platforms/cpu.py): its prefill sees only new tokens. It
        # would answer from a loaded prefix all the same, and wrongly.
        raise InvalidError(
            "prefixstore: prefix caching is off and the model has latent attention (MLA): here vLLM "
            "may not be able to go on from a loaded prefix. Where it can, set "
            "--enable-prefix-caching; vLLM's build for CPUs cannot without AMX: run it without "
            "prefixstore"
        )
    if not config.cache_config.enable_prefix_caching and len(groups) > 1:
        raise InvalidError(
            "prefixstore: a model with several KV groups needs vLLM's prefix caching, which aligns "
            "their blocks: set enable_prefix_caching (--enable-prefix-caching), or run without "
            "prefixstore"
        )
    if current_platform.is_cpu() and MambaAttentionBackendEnum.SHORT_CONV in _states(specs):
        raise InvalidError(
            "prefixstore: vLLM's build for CPUs computes short convolutions (LFM2) differently from run "
            "to run, so what one run stores is not what another would compute; run it without "
            "prefixstore"
        )
    describe_groups(caches, blocks_per_chunk=blocks_per_chunk)  # Refuses what is new to us.


def name_unseen(config: "VllmConfig", caches: "KVCacheConfig") -> list[str]:
    """Name what this model keeps that no engine was ever seen to get back right, for its log."""
    specs = [spec for group in caches.kv_cache_groups for spec in _layer_specs(group.kv_cache_spec)]
    unseen = {f"states of {state.name}" for state in _states(specs) - {SEEN_STATE}}
    if config.model_config.use_mla:
        unseen.add("latent attention (MLA)")
    if any(isinstance(spec, ChunkedLocalAttentionSpec) for spec in specs):
        unseen.add("chunked local attention")
    return sorted(unseen)


def _states(specs: Sequence[Any]) -> set[MambaAttentionBackendEnum]:
    return {spec.mamba_type for spec in specs if isinstance(spec, MambaSpec)}


def describe_groups(caches: "KVCacheConfig", *, blocks_per_chunk: int) -> list[GroupShape]:
    """Return the shape of each group that can be shared, in vLLM's order."""
    return [
        _group_shape(group, blocks_per_chunk=blocks_per_chunk)
        for group in caches.kv_cache_groups
        if group.kv_cache_spec.prefix_cacheable
    ]


def _group_shape(group: Any, *, blocks_per_chunk: int) -> GroupShape:
    specs = _layer_specs(group.kv_cache_spec)
    layers = len(group.layer_names) if len(specs) == 1 else 1
    first = specs[0]
    chunk_tokens = first.block_size * blocks_per_chunk
    window: int | None = None
    match first:
        case MambaSpec():
            window = 1
        case SlidingWindowSpec():
            window = max(1, -(-(first.sliding_window - 1) // chunk_tokens))
        case ChunkedLocalAttentionSpec():
            window = -(-first.attention_chunk_size // chunk_tokens)
        case FullAttentionSpec():
            pass
        case _:
            raise InvalidError(
                f"prefixstore: KV of the kind {type(first).__name__} is new to prefixstore, so it "
                "cannot say what a prefix of it needs; run without prefixstore"
            )
    return GroupShape(
        chunk_tokens=chunk_tokens,
        chunk_bytes=blocks_per_chunk * layers * sum(spec.real_page_size_bytes for spec in specs),
        window_chunks=window,
        is_state=isinstance(first, MambaSpec),
    )


def describe_reaches(config: "VllmConfig", caches: "KVCacheConfig") -> dict[int, Reach]:
    """Return what a prompt needs of each group, as vLLM's lookup sees it; in the scheduler's process."""
    blocks = _blocks_per_chunk(config, caches)
    return {
        number: _reach(group.kv_cache_spec, group.kv_cache_spec.block_size * blocks)
        for number, group in enumerate(caches.kv_cache_groups)
    }


def _reach(spec: Any, chunk_tokens: int) -> Reach:
    """Work out a group's reach (offloading/scheduler.py, ``get_sliding_window_size_in_chunks``)."""
    match spec:
        case MambaSpec():
            return Reach(chunk_tokens=chunk_tokens, window_chunks=1)
        case SlidingWindowSpec():
            return Reach(
                chunk_tokens=chunk_tokens,
                window_chunks=-(-spec.sliding_window // chunk_tokens),
                window_tokens=spec.sliding_window - 1 + spec.extra_retained_tokens,
            )
        case ChunkedLocalAttentionSpec():
            chunks = -(-spec.attention_chunk_size // chunk_tokens)
            return Reach(chunk_tokens=chunk_tokens, window_chunks=chunks)
    return Reach(chunk_tokens=chunk_tokens, is_guessed=not isinstance(spec, FullAttentionSpec))


def _layer_specs(spec: Any) -> list[Any]:
    """Return the layers' specs of a group whose layers differ, else the one that all share."""
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def choose_interval(groups: Sequence[GroupShape], *, step: int = 1) -> int | None:
    """Choose how often, in tokens, windows and states are kept; None where there are none.

    Windows at every interval may cost as many bytes as the full attention in between, where that gives
    an interval neither too short to matter nor too long to hit; rounded up to what all chunks and ``step``
    divide.

    >>> full = GroupShape(chunk_tokens=16, chunk_bytes=16)
    >>> choose_interval([full, GroupShape(chunk_tokens=16, chunk_bytes=16, window_chunks=40)])
    640
    """
    windows = [(group, group.window_chunks) for group in groups if group.window_chunks is not None]
    if not windows:
        return None
    step = math.lcm(step, *(group.chunk_tokens for group in groups))
    boundary_bytes = sum(group.chunk_bytes * chunks for group, chunks in windows)
    full_bytes_per_token = sum(
        group.chunk_bytes / group.chunk_tokens for group in groups if group.window_chunks is None
    )
    affordable = boundary_bytes / full_bytes_per_token if full_bytes_per_token else 0.0
    tokens = min(max(affordable, INTERVAL_SMALLEST), INTERVAL_LARGEST)
    return math.ceil(tokens / step) * step


def stored_bytes(groups: Sequence[GroupShape], *, tokens: int, interval: int | None) -> int:
    """Return the payload bytes that a prompt of ``tokens`` leaves in the store.

    Args:
        groups: The model's groups.
        tokens: The prompt's length.
        interval: Windows are kept at its multiples, and at the prompt's end; None: only there.
    """
    step = math.lcm(*(group.chunk_tokens for group in groups))
    ends = {(tokens - 1) // step * step}
    if interval is not None:
        ends.update(range(interval, tokens, interval))
    total = 0
    for group in groups:
        if group.window_chunks is None:
            total += tokens // group.chunk_tokens * group.chunk_bytes
            continue
        kept: set[int] = set()
        for end in ends:
            last = end // group.chunk_tokens
            kept.update(range(max(0, last - group.window_chunks), last))
        total += len(kept) * group.chunk_bytes
    return total


def keep_windows(config: "VllmConfig", caches: "KVCacheConfig") -> "Boundaries | None":
    """Have vLLM keep windows and states at an interval, where the model has such groups.

    An interval that the user gave stays. Called in the scheduler's process, before vLLM reads it.

    Returns:
        What ends the scheduler's steps at the interval; None where no state needs it.
    """
    if not any(isinstance(group.kv_cache_spec, SPARSE) for group in caches.kv_cache_groups):
        return None
    groups = describe_groups(caches, blocks_per_chunk=_blocks_per_chunk(config, caches))
    interval = choose_interval(groups, step=_scheduler_block(config, caches))
    if interval is None:
        return None
    given: int | None = config.cache_config.prefix_cache_retention_interval
    if given == 0:
        set_retention(config, caches, interval)
        longest = config.model_config.max_model_len
        more = stored_bytes(groups, tokens=longest, interval=interval)
        fewer = stored_bytes(groups, tokens=longest, interval=None)
        logger.info(
            "windows and states are kept every %d tokens, so that prompts which share a beginning hit; "
            "a prompt of %d tokens stores %.1f MB a worker instead of %.1f. "
            "--prefix-cache-retention-interval sets another, shared_prefixes=false none",
            interval,
            longest,
            more / 1e6,
            fewer / 1e6,
        )
    elif given is not None:
        interval = given
    aligned = any(
        isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align"
        for group in caches.kv_cache_groups
        for spec in _layer_specs(group.kv_cache_spec)
    )
    return Boundaries(interval) if aligned else None


def _scheduler_block(config: "VllmConfig", caches: "KVCacheConfig") -> int:
    """Work out what vLLM wants an interval to be a multiple of: the blocks of all groups, shared or not.

    See ``resolve_kv_cache_block_sizes`` in v1/core/kv_cache_utils.py.
    """
    sizes = [group.kv_cache_spec.block_size for group in caches.kv_cache_groups]
    return math.lcm(*sizes) if len(sizes) > 1 else config.cache_config.block_size


def _blocks_per_chunk(config: "VllmConfig", caches: "KVCacheConfig") -> int:
    """Work out vLLM's unit of offloading (offloading/config.py, ``build_offloading_config``)."""
    transfer = config.kv_transfer_config
    assert transfer is not None, "vLLM builds a connector from it"
    options = transfer.kv_connector_extra_config
    if (tokens := options.get("block_size")) is not None:
        return max(1, int(tokens) // caches.kv_cache_groups[0].kv_cache_spec.block_size)
    return int(options.get("blocks_per_chunk") or 1)


@dataclass(slots=True)
class Boundaries:
    """Ends the scheduler's steps where states are to be kept. Not thread-safe.

    In its align mode vLLM writes a recurrent layer's state where a step ends, and ends one where a
    request's ``shared_prefix_boundary`` lies (v1/core/sched/scheduler.py,
    ``_mamba_block_aligned_split``): the point up to which it has seen another request begin alike. The
    next multiple of the interval is such a point too: some other prompt will.

    Attributes:
        interval: Tokens between two states.
    """

    interval: int
    _prefilling: dict[str, tuple["Request", int]] = field(default_factory=dict)

    def begin(self, request: "Request", *, computed_tokens: int) -> None:
        """Take up a request that may be scheduled now, from its first token not computed."""
        found = request.shared_prefix_boundary
        self._prefilling[request.request_id] = (request, found)
        self._set_next(request, found=found, after=computed_tokens)

    def end_step(self, scheduled_tokens: "dict[str, int]") -> None:
        """Move on those requests whose boundary this step comes to.

        Args:
            scheduled_tokens: For each request of the step, the tokens that it computes.
        """
        for request_id, tokens in scheduled_tokens.items():
            if (entry := self._prefilling.get(request_id)) is None:
                continue
            request, found = entry
            reached = request.num_computed_tokens + tokens
            if reached >= request.num_prompt_tokens:
                del self._prefilling[request_id]
            elif reached >= request.shared_prefix_boundary:
                self._set_next(request, found=found, after=reached)

    def forget(self, request_id: str) -> None:
        """Drop a request that ended."""
        self._prefilling.pop(request_id, None)

    def _set_next(self, request: "Request", *, found: int, after: int) -> None:
        multiple = (after // self.interval + 1) * self.interval
        request.shared_prefix_boundary = min(
            boundary for boundary in (found, multiple) if boundary > after
        )
