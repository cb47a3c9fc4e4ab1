"""vLLM's real scheduler and our real connector in both roles, above a model whose KV can be checked.

The model is arithmetic: what a token leaves in its KV slot is a digest of all tokens up to it, and so is the
token that comes next. So before each step every slot that the scheduler believes computed can be compared
with what it must hold, wherever it came from; and every blob of a root as well. A step takes a millisecond,
thus thousands of arrivals, aborts, preemptions and loads fit into a test.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

TOKENS = 16
LANES = 4
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
VOCABULARY = 40
PATIENCE_S = 20.0

MODES: dict[str, dict[str, Any]] = {
    "tier": {"cpu_bytes_to_use": 2**20, "load_policy": "always"},
    "direct": {"mode": "direct", "buffers_bytes": 2**20},
}
"""The connector's options of each of our two ways."""

BOOKS = frozenset(
    {
        "requests", "_requests", "_questions", "_asking", "_results", "_storing", "_renamed",
        "_accounted", "_preemptions", "_promised", "_waits_since_s", "_req_status", "_req_state",
        "_jobs", "_finds", "_ended", "_stores", "_loads", "_chunks", "_failed_blocks",
        "_failed_requests", "_finds_waiting", "_readers",
    }
)  # fmt: skip
"""Attributes that tell of requests and transfers under way, in vLLM's scheduler and in ours."""


def chain(tokens: Sequence[int]) -> list[int]:
    """Return what each token leaves in its slot."""
    digest, out = 0, []
    for token in tokens:
        digest = (digest * 1_000_003 + token * 7919 + 12_345) % (2**31 - 1)
        out.append(digest)
    return out


def slots(digests: Sequence[int], *, group: int = 0) -> np.ndarray:
    """Return the KV of tokens with these digests, in one KV group: one row each."""
    lanes = np.arange(LANES, dtype=np.int32) * 0x01010101 + group * 0x00030507
    return np.asarray(digests, dtype=np.int32)[:, None] + lanes


@dataclass
class _Row:
    """What a model runner remembers of one request."""

    tokens: list[int]
    blocks: list[list[int]]  # Of each KV group.


@dataclass
class Machine:
    """One engine without a model, on one root.

    Args:
        model: A directory with weights: they name the namespace, and are not read further.
        options: Of the connector.
        blocks: Of the device's KV cache, 16 tokens each.
        ahead: How many steps are scheduled before the output of the first is taken.
        windows: For each KV group, the tokens of its sliding window; None: full attention.
    """

    model: Path
    options: dict[str, Any]
    blocks: int = 64
    ahead: int = 0
    windows: Sequence[int | None] = (None,)
    engine: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, _Row] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    prefixes: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    steps: int = 0
    loaded_tokens: int = 0

    def __post_init__(self) -> None:
        transfer = KVTransferConfig(
            kv_connector="PrefixStoreConnector",
            kv_connector_module_path="prefixstore.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config=dict(self.options),
        )
        arguments = {
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "block_size": TOKENS,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "async_scheduling": bool(self.ahead),
            **self.engine,
        }
        config = EngineArgs(
            model=str(self.model), kv_transfer_config=transfer, **arguments
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = self.blocks
        self.config = config
        specs = [_spec(window) for window in self.windows]
        layers = list(LAYERS[: len(specs)])
        size = self.blocks * specs[0].page_size_bytes
        self.caches = KVCacheConfig(
            num_blocks=self.blocks,
            kv_cache_tensors=[
                KVCacheTensor(size=size, **_placement(layer, size, specs[0].page_size_bytes))
                for layer in layers
            ],
            kv_cache_groups=[
                KVCacheGroupSpec([layer], spec) for layer, spec in zip(layers, specs, strict=True)
            ],
            hash_block_size=TOKENS,
        )
        self.memory = torch.zeros((self.blocks, TOKENS * LANES), dtype=torch.float32)
        self.kv = self.memory.numpy().view(np.int32).reshape(self.blocks, TOKENS, LANES)
        with set_current_vllm_config(config):
            self.worker = KVConnectorFactory.create_connector(
                config, KVConnectorRole.WORKER, self.caches
            )
            self.worker.register_kv_caches(dict.fromkeys(layers, self.memory))
            kind = AsyncScheduler if self.ahead else Scheduler
            self.scheduler = kind(
                config,
                self.caches,
                SimpleNamespace(
                    grammar_init=lambda _: None,
                    accept_tokens=lambda *_: True,
                    should_advance=lambda _: False,
                ),
                block_size=TOKENS,
                hash_block_size=TOKENS,
                log_stats=True,
            )
        self.connector = self.scheduler.connector
        account = self.worker.get_handshake_metadata()
        if account is not None:
            self.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): account})
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(TOKENS, hash_fn)
        self._flying: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def add(self, name: str, tokens: Sequence[int], *, answer: int = 1, **fields: Any) -> Request:
        """Let a request arrive."""
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True, **fields.pop("sampling", {}))
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
            **fields,
        )
        self.scheduler.add_request(request)
        self.answers.setdefault(name, [])
        return request

    def abort(self, name: str) -> None:
        """Let a client go away."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Do what the engine's core does in one step."""
        self.steps += 1
        for request in self.scheduler.requests.values():
            for number, name in enumerate(request.block_hashes, start=1):
                self.prefixes.setdefault(
                    bytes(name), tuple(request._all_token_ids[: number * TOKENS])
                )
        output = self.scheduler.schedule()
        self._flying.append((output, self._execute(output)))
        if len(self._flying) > self.ahead:
            self._take()

    def _take(self) -> None:
        output, result = self._flying.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.answers[one.request_id] += one.new_token_ids

    def step_until(self, condition: Callable[[], bool], what: str) -> None:
        """Step until something holds."""
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"waited {PATIENCE_S} s for {what}"
            self.step()
            time.sleep(0.0002)

    def settle(self) -> None:
        """Step until no request is left, nothing is in flight and all that was offered is stored."""
        self.step_until(
            lambda: not (self.scheduler.has_requests() or self._client.busy), "an idle engine"
        )
        while self._flying:
            self._take()

    def serve(self, name: str, tokens: Sequence[int], **fields: Any) -> int:
        """Serve one request to its end; return how many of its tokens were not computed."""
        before = self.loaded_tokens
        self.add(name, tokens, **fields)
        self.settle()
        return self.loaded_tokens - before

    def await_state(self, state: str) -> None:
        """Wait until the store is in a state."""
        self.step_until(lambda: state == self.state, f"the store to be {state}")

    def check_root(self, root: Path) -> int:
        """Compare every blob with what its key stands for; return how many there are."""
        count = 0
        for path in sorted(root.glob("ns/*/*/*/*.kv")):
            key = bytes.fromhex(path.stem)
            tokens, group = self.prefixes[key[:-4]], int.from_bytes(key[-4:], "big")
            length = TOKENS * int(self.options.get("blocks_per_chunk", 1))
            payload = np.frombuffer(path.read_bytes()[4096:], dtype=np.int32)
            expected = slots(chain(tokens)[-length:], group=group).ravel()
            np.testing.assert_array_equal(
                expected, payload[: expected.size], f"the blob of {path.stem}"
            )
            count += 1
        return count

    def left_behind(self) -> list[str]:
        """Name the books that an idle engine still keeps of requests, and blocks that it still holds."""
        scheduler, connector = self.scheduler, self.connector
        owners = [scheduler]
        if self.is_direct:
            owners += [connector._scheduler, self.worker._worker]
            assert len(self.worker._worker._ring.free) == self.worker._worker._ring.count
        else:
            offloading = connector.connector_scheduler
            owners += [connector, connector._tier, connector._tier._admission, offloading]
            owners += [connector._tier._admission._budget, offloading.manager]
        kept = [
            f"{type(owner).__name__}.{name}: {len(value)}"
            for owner in owners
            for name, value in vars(owner).items()
            if name in BOOKS and len(value)
        ]
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return kept if free == self.blocks - 1 else [*kept, f"{self.blocks - 1 - free} blocks"]

    def close(self) -> None:
        """Shut down as an engine does."""
        self.scheduler.shutdown()
        self.worker.shutdown()

    @property
    def state(self) -> str:
        """The store's state, as metrics tell it."""
        if self.is_direct:
            return str(self.worker._worker.state)
        return str(self.connector.store_state[0])

    @property
    def is_direct(self) -> bool:
        """Whether there is no CPU tier."""
        return self.options.get("mode") == "direct"

    @property
    def _client(self) -> Any:
        if self.is_direct:
            return self.worker._worker._client
        return self.connector._tier._binding.client

    # The model runner's side.

    def _execute(self, output: Any) -> ModelRunnerOutput:
        with self._as_transfer_group(), set_forward_context(None, self.config):
            self.worker.handle_preemptions(output.kv_connector_metadata)
            for name in output.finished_req_ids:
                self.rows.pop(name, None)
            lifecycle = KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output)
            with lifecycle as transfers:
                sampled = self._compute(output)
        if not output.num_scheduled_tokens:
            return ModelRunnerOutput.with_kv_conn_output_only(transfers)
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            kv_connector_output=transfers,
        )

    @contextlib.contextmanager
    def _as_transfer_group(self) -> Iterator[None]:
        kv_transfer_state._KV_CONNECTOR_AGENT = self.worker
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    def _compute(self, output: Any) -> dict[str, list[int]]:
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            if new.req_id not in self.rows:
                self.loaded_tokens += new.num_computed_tokens
            self.rows[new.req_id] = _Row(
                list(new.prompt_token_ids), [[*ids] for ids in new.block_ids]
            )
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            row, blocks = self.rows[name], cached.new_block_ids[i]
            if (tokens := cached.all_token_ids.get(name)) is not None:
                row.tokens = list(tokens)
            if name in cached.resumed_req_ids:
                row.blocks = [[] for _ in self.windows]
            for group, more in enumerate(blocks or ()):
                row.blocks[group] += more
            computed[name] = cached.num_computed_tokens[i]
        sampled = {}
        for name, count in output.num_scheduled_tokens.items():
            row, begin = self.rows[name], computed[name]
            digests = chain(row.tokens)
            self._check(name, row, digests[:begin])
            for position in range(begin, begin + count):
                for group, blocks in enumerate(row.blocks):
                    kv = slots([digests[position]], group=group)
                    self.kv[blocks[position // TOKENS], position % TOKENS] = kv[0]
            is_partial = begin + count < len(row.tokens)
            sampled[name] = [] if is_partial else [digests[-1] % VOCABULARY]
            row.tokens += sampled[name]
        return sampled

    def _check(self, name: str, row: _Row, digests: Sequence[int]) -> None:
        """Fail where the device holds other KV than the tokens stand for."""
        for group, (blocks, window) in enumerate(zip(row.blocks, self.windows, strict=True)):
            first = 0 if window is None else max(0, len(digests) + 1 - window)
            held = self.kv[blocks].reshape(-1, LANES)[first : len(digests)]
            wrong = np.flatnonzero((held != slots(digests, group=group)[first:]).any(axis=1))
            assert not wrong.size, (
                f"{name}: wrong KV in group {group} from token {first + wrong[0]} of {len(digests)} "
                f"in step {self.steps}"
            )


def _spec(window: int | None) -> FullAttentionSpec | SlidingWindowSpec:
    kv = {"block_size": TOKENS, "num_kv_heads": 1, "head_size": LANES // 2, "dtype": torch.float32}
    if window is None:
        return FullAttentionSpec(**kv)
    return SlidingWindowSpec(**kv, sliding_window=window)


def _placement(layer: str, size: int, page_bytes: int) -> dict[str, Any]:
    """Return where a layer lies, in the words of this vLLM: groups overlay each other."""
    names = KVCacheTensor.__dataclass_fields__
    values = {
        "layers": [layer],
        "shared_by": [layer],
        "offset": 0,
        "layer_stride": size,
        "block_stride": page_bytes,
    }
    return {name: value for name, value in values.items() if name in names}


NewMachine = Callable[..., Machine]
"""Makes one on the test's root: ``conftest.new_machine``."""


def answers_of(prompt: Sequence[int], count: int) -> list[int]:
    """Return what the model answers."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(chain(tokens)[-1] % VOCABULARY)
    return tokens[len(prompt) :]
