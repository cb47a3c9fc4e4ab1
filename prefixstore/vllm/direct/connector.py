"""The connector of the direct path: vLLM's calls, each in its guard, on to our two sides.

vLLM builds one object for the scheduler and one in each worker. Errors of configuration refuse to
start; everything later is a miss or a skipped store.
"""

import logging
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from prefixstore.clock import SystemClock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.vllm import metrics
from prefixstore.vllm.direct.messages import StepOrders, StepReport, StoreOrder
from prefixstore.vllm.direct.opening import open_worker
from prefixstore.vllm.direct.scheduler import DirectScheduler
from prefixstore.vllm.direct.shapes import (
    check_alone,
    check_topology,
    chunk_shapes,
    keep_interval,
)
from prefixstore.vllm.direct.worker import OPEN_PATIENCE_S
from prefixstore.vllm.direct.worth import MatchWorth
from prefixstore.vllm.engine_calls import listen_to_engine
from prefixstore.vllm.guard import guarded
from prefixstore.vllm.options import check_options
from prefixstore.vllm.shapes import check_shape, describe_groups, keep_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from prefixstore.vllm.direct.chunks import ChunkShape
    from prefixstore.vllm.direct.worker import DirectWorker

__all__ = ["DirectConnector"]

logger = logging.getLogger("prefixstore")

YIELD_S = 50e-6
"""How long a step without a forward pass lets go of the GIL while requests wait for this worker: the
pump that they wait for would else get it once in the interpreter's switch interval, 5 ms."""

STORES_YIELD_S = 1e-3
"""The same while only stores wait for a buffer: the I/O process that empties them may have no other core."""


@dataclass
class OrdersMessage(KVConnectorMetadata):
    """A step's orders, as vLLM carries them to the workers.

    Attributes:
        orders: The orders.
        books: Whose they are, for a worker in the same process: it is not carried to another.
    """

    orders: StepOrders
    books: DirectScheduler | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"orders": self.orders, "books": None}


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """Reports, as vLLM carries and joins them on their way back."""

    report: StepReport

    @override
    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ReportMessage":
        assert isinstance(other, ReportMessage), "all workers run this connector"
        return ReportMessage(self.report.join(other.report))


class _Counters:
    """What the worker observes, as the tier's metrics."""

    def __init__(self, observed: metrics.TierMetrics) -> None:
        self._observed = observed

    def missed(self, reason: str, chunks: int = 1) -> None:
        self._observed.count(metrics.LOAD_MISSES, reason, by=chunks)

    def skipped(self, reason: str, chunks: int = 1) -> None:
        self._observed.count(metrics.STORES_SKIPPED, reason, by=chunks)

    def moved(self, *, loaded_bytes: int = 0, stored_bytes: int = 0) -> None:
        self._observed.count(metrics.LOAD_BYTES, by=loaded_bytes)
        self._observed.count(metrics.STORE_BYTES, by=stored_bytes)


def _nothing() -> None:
    """Tell nobody."""


def _no_results() -> set[str] | None:
    return None


def _no_stores() -> list[StoreOrder] | None:
    return None


def _no_match() -> tuple[int | None, bool]:
    return 0, False


def _given_away(
    output: "SchedulerOutput", shapes: "Sequence[ChunkShape]"
) -> "Iterator[Sequence[int]]":
    """Yield the blocks that a step gives to requests; those of a load are known from its order."""
    news = [(new.block_ids, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for request_id, more, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if more is not None:
            news.append((more, computed if request_id in cached.resumed_req_ids else 0))
    for groups, computed in news:
        for blocks, shape in zip(groups, shapes, strict=True):
            yield blocks[computed // shape.tokens_per_block :]
    for copy in output.kv_cache_block_copies or ():
        yield [copy.dst_block_id]


class DirectConnector(KVConnectorBase_V1, SupportsHMA):
    """One role of the direct path in one process."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        # A load that fails is computed; vLLM's default would fail the request.
        transfer.kv_load_failure_policy = "recompute"
        extra = transfer.kv_connector_extra_config
        self._options = check_options(extra)
        self._clock = SystemClock()
        self._metrics = metrics.TierMetrics()
        check_topology(vllm_config)
        check_shape(vllm_config, kv_cache_config)
        check_alone(get_current_vllm_config_or_none())
        self._blocks_per_chunk = int(extra.get("blocks_per_chunk", 1))
        self._shapes = chunk_shapes(kv_cache_config, blocks=self._blocks_per_chunk)
        self._rank = vllm_config.parallel_config.rank
        self._worker: DirectWorker | None = None
        self._books_nearby: DirectScheduler | None = None
        self._handled: BaseException | None = None
        self._scheduler: DirectScheduler | None = None
        if role is KVConnectorRole.SCHEDULER:
            # With speculative decoding the store is off, and windows would be kept for nothing.
            if self._options.shared_prefixes and vllm_config.speculative_config is None:
                keep_windows(vllm_config, kv_cache_config)
            retention = vllm_config.cache_config.prefix_cache_retention_interval
            self._scheduler = DirectScheduler(
                shapes=self._shapes,
                interval=keep_interval(self._shapes, retention),
                ranks=vllm_config.parallel_config.tensor_parallel_size,
                find_patience_s=self._options.find_deadline_s + OPEN_PATIENCE_S,
                clock=self._clock,
                prompts_only=bool(extra.get("offload_prompt_only", True)),
                worth=self._make_worth() if self._options.load_policy == "auto" else None,
            )
            if missing := listen_to_engine(self):
                logger.warning("store is off: this vLLM has no %s", ", ".join(missing))
                self._scheduler.turn_off()

    @property
    @override
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a miss later, so no request has to wait for it."""
        return False

    def _make_worth(self) -> MatchWorth:
        groups = describe_groups(self._kv_cache_config, blocks_per_chunk=self._blocks_per_chunk)
        return MatchWorth(
            [group.chunk_bytes for group in groups],
            clock=self._clock,
            declined=lambda chunks: self._metrics.count(metrics.DECLINED_HITS, "slower", by=chunks),
        )

    def count_failure(self, callback: str) -> None:
        """Count a callback that failed and was answered with its safe value."""
        self._metrics.count(metrics.FAILED_CALLBACKS, callback)

    # In each worker's process.

    @override
    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        self._worker, bind = open_worker(
            self._vllm_config,
            self._kv_cache_config,
            kv_caches,
            options=self._options,
            blocks_per_chunk=self._blocks_per_chunk,
            observer=_Counters(self._metrics),
            clock=self._clock,
        )
        # Identifying weights reads them once if they are new here: not on the engine's way up.
        threading.Thread(
            target=self._bind, args=(bind,), name="prefixstore-identify", daemon=True
        ).start()

    def _bind(self, bind: Any) -> None:
        assert self._worker is not None, "made before the thread"
        try:
            bind()
        except PrefixStoreError as error:
            self._worker.turn_off(str(error))
        except Exception:
            logger.exception("cannot work out the namespace")
            self._worker.turn_off(
                "the namespace could not be worked out; the log has the traceback"
            )

    @override
    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # Whoever drives the engine may be handling an exception: that one is none of this step's.
        self._handled = sys.exception()
        if self._worker is not None and isinstance(kv_connector_metadata, OrdersMessage):
            self._books_nearby = kv_connector_metadata.books
            self._worker.begin(kv_connector_metadata.orders)

    @override
    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        if not self._start() and self._worker is not None:
            self._worker.refuse(self._bound_orders())

    @guarded(lambda: False)
    def _start(self) -> bool:
        if self._worker is not None:
            self._worker.start(self._bound_orders())
        return True

    @override
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: no request is scheduled before its load has ended."""

    @override
    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Return at once: chunks are copied whole, after the last layer."""

    @override
    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        # vLLM calls this on the way out of a forward pass that failed, too
        # (v1/worker/kv_connector_model_runner_mixin.py).
        raised = sys.exception()
        has_failed = raised is not None and raised is not self._handled
        self._handled = None
        if self._worker is None:
            return
        if has_failed:
            self._worker.fail()
        self._worker.save(self._bound_orders())

    @override
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        loaded = self._poll()
        if loaded is None:
            assert self._worker is not None, "polled just now"
            # Requests wait for these reports: without one they would wait for ever.
            loaded = self._worker.abandon()
        return set(), loaded

    @guarded(_no_results)
    def _poll(self) -> set[str] | None:
        if self._worker is None:
            return set()
        if self._bound_orders().is_idle:
            if self._worker.is_waiting:
                self._clock.sleep(YIELD_S)
            elif self._worker.is_storing:
                self._clock.sleep(STORES_YIELD_S)
        return self._worker.poll()

    @override
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving |= self._take_failed_requests()
        return results

    @guarded(set[str])
    def _take_failed_requests(self) -> set[str]:
        return self._worker.take_failed_requests() if self._worker is not None else set()

    @override
    @guarded(set[int])
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    @override
    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.take_report() if self._worker is not None else None
        if report is None:
            return None
        return ReportMessage(StepReport(ranks={self._rank: report}))

    @override
    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        # One worker speaks for all: a gauge that each sets would tell of the last.
        if self._worker is not None and self._rank == 0:
            self._metrics.set_state(self._worker.state)
        return self._metrics.take()

    @override
    @guarded(lambda: None)
    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close(self._options.drain_s, last=self._take_last_stores())

    @guarded(_no_stores)
    def _take_last_stores(self) -> list[StoreOrder] | None:
        """Return the stores that no step will carry; None where it is not known what the KV cache holds.

        Between steps vLLM may discard it (sleep), and calls to the workers may do anything to it. The
        scheduler's side is told, and a worker in another process would hear of it with the next step.
        """
        if self._books_nearby is None or self._worker is None:
            return None
        return self._books_nearby.take_last_stores(self._worker.ended_step)

    def _bound_orders(self) -> StepOrders:
        message = self._get_connector_metadata()
        assert isinstance(message, OrdersMessage), "made by this connector's other role"
        return message.orders

    # In the scheduler's process.

    @override
    @guarded(lambda: None)
    def on_new_request(self, request: "Request") -> None:
        self._books.add(request)

    @override
    @guarded(_no_match)
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        matched = self._books.count_matched(request, num_computed_tokens)
        return matched, bool(matched)

    @override
    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if not self._order_load(request, blocks, num_external_tokens) and num_external_tokens:
            self._doom_load(request, blocks, num_external_tokens)

    @guarded(lambda: False)
    def _order_load(self, request: "Request", blocks: "KVCacheBlocks", tokens: int) -> bool:
        self._books.allocate(request, blocks.get_block_ids(), tokens)
        return True

    @guarded(lambda: None)
    def _doom_load(self, request: "Request", blocks: "KVCacheBlocks", tokens: int) -> None:
        self._books.doom(request.request_id, blocks.get_block_ids(), tokens)

    @override
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        is_known = self._give_away(scheduler_output)
        orders = self._books.take_loads()
        # What is not known to stay may be overwritten by this step.
        orders.are_all_overwritten |= not is_known
        self._plan(orders, scheduler_output)
        return OrdersMessage(orders, self._books)

    @guarded(lambda: False)
    def _give_away(self, output: "SchedulerOutput") -> bool:
        for blocks in _given_away(output, self._shapes):
            self._books.give_away(blocks)
        return True

    @guarded(lambda: None)
    def _plan(self, orders: StepOrders, output: "SchedulerOutput") -> None:
        state = output.kv_connector_block_state
        assert state is not None, "vLLM hands it to connectors"
        for new in output.scheduled_new_reqs:
            if getattr(new, "prompt_embeds", None) is not None:
                self._books.leave_alone(new.req_id)
        self._books.plan(
            orders,
            scheduled_tokens=output.num_scheduled_tokens,
            preempted=output.preempted_req_ids or (),
            blocks_of=state.resolve_block_ids,
        )

    @override
    @guarded(lambda: None)
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        message = connector_output.kv_connector_worker_meta
        if isinstance(message, ReportMessage):
            self._books.take_report(message.report)
        self._books.take_failures(
            connector_output.invalid_block_ids, connector_output.failed_recving
        )
        self._books.end_loads(connector_output.finished_recving or ())

    @override
    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._finish(request, (block_ids,))
        return False, None

    @guarded(lambda: None)
    def _finish(self, request: "Request", blocks: "Sequence[Sequence[int]]") -> None:
        self._books.finish(request, blocks)

    @override
    @guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        return self._books.is_reading

    @override
    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._finish(request, block_ids)
        return False, None

    @override
    @guarded(lambda: False)
    def reset_cache(self) -> bool:
        # vLLM calls this when weights were updated or the engine slept. What the model computes from
        # now on may belong to another namespace.
        self._books.turn_off()
        return True

    # Calls to the engine that vLLM has no hook for.

    def adapter_loading(self, lora: "LoRARequest") -> "Callable[[], None]":
        """Take no note: requests with an adapter pass by."""
        del lora
        return _nothing

    def adapter_removed(self, adapter_id: int) -> None:
        """Take no note."""

    def adapter_pinned(self, adapter_id: int) -> None:
        """Take no note."""

    @guarded(lambda: None)
    def workers_called(self, method: str) -> None:
        """Turn the store off: the workers may have other weights from here on."""
        logger.warning("collective_rpc called %r of the workers", method)
        self._books.turn_off()

    @property
    def _books(self) -> DirectScheduler:
        if self._scheduler is None:
            raise InvalidError("called in a worker's process")
        return self._scheduler
