"""vLLM's real tiering manager and CPU tier with our tier below, driven the way its scheduler drives them.

No engine and no model: keys, slots and steps are real, and what a chunk holds is told by its key, so
that every byte that lands in a slot can be checked.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from prefixstore.vllm.adapters import AdapterUse
from prefixstore.vllm.spec import PrefixStoreSpec
from prefixstore.vllm.tier import PrefixStoreTier

CHUNK_BYTES = 8192
TOKENS = 16
PATIENCE_S = 20.0


def make_config(
    root: Path, *, slots: int, engine: str, events: bool = False, **options: object
) -> OffloadingConfig:
    """Describe a single-worker engine whose CPU tier has ``slots`` slots."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=TOKENS, layer_names=("0",), group_id=0),),
        worker_kv_bytes_per_block=CHUNK_BYTES,
        enable_kv_cache_events=events,
        extra_config={
            "cpu_bytes_to_use": slots * CHUNK_BYTES,
            "secondary_tiers": [
                {
                    "type": "PrefixStoreTier",
                    "module_path": "prefixstore.vllm.tier",
                    "root": str(root),
                    "namespace": "test",
                    "miss_ttl_s": 0.0,
                    **options,
                }
            ],
        },
        engine_id=engine,
        model=OffloadingModelConfig(name="model", dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=TOKENS, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=True,
        ),
    )


def prompt(name: str, chunks: int, *, after: tuple[OffloadKey, ...] = ()) -> tuple[OffloadKey, ...]:
    """Return the keys of a prompt that begins with the keys ``after``."""
    own = (
        OffloadKey(f"{name}{i}".encode().ljust(32, b".") + bytes(4))
        for i in range(chunks - len(after))
    )
    return (*after, *own)


def content(key: OffloadKey) -> np.ndarray:
    """Return what a chunk holds."""
    seed = int.from_bytes(key[:16], "big") % 251
    return np.arange(CHUNK_BYTES, dtype=np.uint32).astype(np.uint8) ^ np.uint8(seed)


def stored_in(root: Path) -> set[OffloadKey]:
    """Return the keys of the blobs that a root holds."""
    return {OffloadKey(bytes.fromhex(path.stem)) for path in root.glob("ns/*/*/*/*.kv")}


@dataclass
class Driver:
    """Plays vLLM's scheduler and worker against a real manager."""

    config: OffloadingConfig
    steps: int = 0
    loaded: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = PrefixStoreSpec(self.config)
        self.manager = self.spec.get_manager()
        self.tier = next(t for t in self.manager.secondary_tiers if isinstance(t, PrefixStoreTier))
        self.slots = np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def await_state(self, state: str) -> None:
        """Wait until the tier's store is in a state."""
        self._until(lambda: self.tier._binding.client.state == state, state)

    def reset(self) -> None:
        """Reset the cache as vLLM does; from 0.33 on promotions are held until workers are flushed."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):
            self.manager.on_reset_flushed()

    def begin(self, name: str, keys: tuple[OffloadKey, ...]) -> ReqContext:
        """Let a request arrive."""
        context = ReqContext(req_id=name)
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, (i + 1) * TOKENS)
        self.manager.on_new_request(context)
        return context

    def scan(self, context: ReqContext, keys: tuple[OffloadKey, ...]) -> int | None:
        """Look a prompt up as the scheduler's prefix lookup does; None: ask again."""
        hits, deferred = 0, False
        for key in keys:
            match self.manager.lookup(key, context):
                case LookupResult.HIT:
                    hits += 1
                case LookupResult.HIT_PENDING:
                    hits, deferred = hits + 1, True
                case LookupResult.RETRY:
                    deferred = True
                case LookupResult.MISS:
                    break
        return None if deferred else hits

    def end_step(self, *scheduled: str) -> None:
        """End a step in which these requests were scheduled for the first time."""
        self.steps += 1
        self.manager.on_schedule_end(ScheduleEndContext(scheduled, ()))

    def load(self, context: ReqContext, keys: tuple[OffloadKey, ...]) -> None:
        """Load confirmed hits to the device, checking each byte."""
        if keys:
            spec = self.manager.prepare_load(keys, context)
            for key, slot in zip(keys, spec.chunk_ids, strict=True):
                np.testing.assert_array_equal(content(key), self.slots[slot][:CHUNK_BYTES])
        self.end_step(context.req_id)
        if keys:
            self.manager.complete_load(keys, context)

    def compute(self, context: ReqContext, keys: tuple[OffloadKey, ...]) -> None:
        """Compute chunks and offer them for storing."""
        output = self.manager.prepare_store(keys, context)
        if output is None or not output.keys_to_store:
            return
        for key, slot in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self.slots[slot][:CHUNK_BYTES] = content(key)
        self.manager.complete_store(set(output.keys_to_store), context)

    def serve(
        self, name: str, keys: tuple[OffloadKey, ...], *, use: AdapterUse | None = None
    ) -> int:
        """Serve one request, with an adapter or not; returns how many chunks were not computed."""
        context = self.begin(name, keys)
        if use is not None:
            self.tier.adapt(name, use)
        hits: int | None = None

        def settled() -> bool:
            nonlocal hits
            hits = self.scan(context, keys)
            if hits is None:
                self.end_step()
            return hits is not None

        self._until(settled, f"request {name} to be scheduled")
        assert hits is not None
        self.load(context, keys[:hits])
        self.compute(context, keys[hits:])
        self.manager.on_request_finished(context)
        return hits

    def settle(self) -> None:
        """Step until nothing is in flight, as an idle engine does."""

        def idle() -> bool:
            self.end_step()
            return not self.manager.has_pending_work()

        self._until(idle, "the manager to be idle")

    def await_stored(self, keys: Iterable[OffloadKey], root: Path) -> None:
        """Step until exactly these chunks are on the root."""

        def stored() -> bool:
            self.end_step()
            return stored_in(root) == set(keys)

        self._until(stored, "the chunks to be stored")
        self.settle()

    def _until(self, condition, what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"waited {PATIENCE_S} s for {what}"
            time.sleep(0.0005)
