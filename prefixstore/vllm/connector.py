"""The front door: the one name that a user gives to vLLM.

    --kv-transfer-config '{"kv_connector": "PrefixStoreConnector",
                           "kv_connector_module_path": "prefixstore.vllm.connector",
                           "kv_role": "kv_both",
                           "kv_connector_extra_config": {"root": "/mnt/kv"}}'

It is vLLM's ``OffloadingConnector`` with our options expanded, and with what only a connector sees: the
whole ``VllmConfig`` in every process, the workers' account of their backends and layouts, and requests
with their adapters. At serving time it does three things: it binds the tier once the namespace is known,
turns it off when the weights may have changed, and tells it of adapters.
"""

import copy
import functools
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from prefixstore.clock import SystemClock
from prefixstore.errors import PrefixStoreError
from prefixstore.vllm.adapters import Adapters, AdapterUse, lora_settings
from prefixstore.vllm.backends import WorkerAccount, describe_worker, join_accounts
from prefixstore.vllm.compat import check_version, forget_blocks, missing_seams, register_name
from prefixstore.vllm.direct.connector import DirectConnector
from prefixstore.vllm.engine_calls import listen_to_engine
from prefixstore.vllm.fingerprint import scheduler_fields
from prefixstore.vllm.guard import guarded
from prefixstore.vllm.layout import join_workers
from prefixstore.vllm.machine import digest_memory, machine_memory, name_shared_memory
from prefixstore.vllm.options import expand
from prefixstore.vllm.shapes import check_shape, describe_reaches, keep_windows, name_unseen
from prefixstore.vllm.spec import PrefixStoreSpec
from prefixstore.vllm.tier import PrefixStoreTier
from prefixstore.vllm.weights import WeightDigests

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from prefixstore.keys import Fields

__all__ = ["PrefixStoreConnector"]

logger = logging.getLogger("prefixstore")

CLOCK = SystemClock()


def _nothing() -> None:
    """Tell nobody."""


def _nothing_to_tell() -> Callable[[], None]:
    return _nothing


def _no_use() -> AdapterUse | None:
    return None


class PrefixStoreConnector(OffloadingConnector):
    """vLLM's offloading connector with a prefixstore root below its CPU tier.

    With ``mode=direct`` an object of another class is made in its place: vLLM knows this one's name
    only, and asks nothing of its class that the other does not answer.

    Attributes:
        namespace_fields: The namespace, once the workers have told of theirs; in the scheduler's process.
    """

    def __new__(
        cls, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> "KVConnectorBase_V1":
        """Make the connector of the chosen mode."""
        if _is_direct(vllm_config):
            _share_engine_log()
            check_version()
            return DirectConnector(vllm_config, role, kv_cache_config)
        made: KVConnectorBase_V1 = super().__new__(cls)
        return made

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        _share_engine_log()
        check_version()
        _expand_options(vllm_config)
        check_shape(vllm_config, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER and (
            unseen := name_unseen(vllm_config, kv_cache_config)
        ):
            logger.warning(
                "prefixstore was never run with %s: compare answers with and without it before you "
                "rely on them",
                ", ".join(unseen),
            )
        self._boundaries = (
            keep_windows(vllm_config, kv_cache_config)
            if role is KVConnectorRole.SCHEDULER and _shares_prefixes(vllm_config)
            else None
        )
        super().__init__(vllm_config, role, kv_cache_config)
        self._engine_config = vllm_config
        self._cache_config = kv_cache_config
        self._account: WorkerAccount | None = None
        self.namespace_fields: Fields | None = None
        self._tier = _find_tier(self) if role is KVConnectorRole.SCHEDULER else None
        if self._tier is not None:
            self._tier.reaches = describe_reaches(vllm_config, kv_cache_config)
        self._accounted: dict[str, int] = {}  # Request → tokens that it has from vLLM and from us.
        self._preemptions: dict[str, int] = {}  # Request → its preemptions when last asked about.
        self._adapters: Adapters | None = None
        missing = missing_seams()
        if self._tier is not None:
            missing += listen_to_engine(self)
            self._adapters = _make_adapters(vllm_config)
            if self._adapters is not None:
                self._tier.serve_adapters(self._adapters)
        if missing:
            self._turn_off(f"this vLLM has no {', '.join(missing)}, which prefixstore reads")

    def count_failure(self, callback: str) -> None:
        """Count a callback that failed and was answered with its safe value."""
        if self._tier is not None:
            self._tier.count_failure(callback)

    # In each worker's process.

    @override
    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        super().register_kv_caches(kv_caches)
        self._describe(kv_caches)

    @guarded(lambda: None)
    def _describe(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Note what this worker's KV looks like; without a note the store stays off."""
        assert self.connector_worker is not None, "vLLM registers caches with workers"
        spec = self.connector_worker.spec
        assert isinstance(spec, PrefixStoreSpec), "the options were expanded with our spec"
        assert spec.slot_layout is not None, "the worker was just built"
        self._account = describe_worker(
            self._engine_config,
            kv_caches,
            rank=spec.config.parallel.rank,
            layout=spec.slot_layout,
        )

    @override
    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        # Without any the output of a step that computes nothing is dropped on its way, and the scheduler's
        # process would not hear of the end of each step that it began.
        meta = super().build_connector_worker_meta()
        return OffloadingWorkerMetadata() if meta is None and self._tier is None else meta

    @override
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._account

    # In the scheduler's process.

    @override
    @guarded(lambda: None)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        accounts = sorted(
            (account for account in metadata.values() if isinstance(account, WorkerAccount)),
            key=lambda account: account.rank,
        )
        world = self._engine_config.parallel_config.world_size
        if len(accounts) != world:
            self._turn_off(
                f"{len(accounts)} of {world} workers said what their KV looks like. Under "
                "MultiConnector the first connector with a handshake of its own takes ours: such a "
                "connector cannot be used beside prefixstore"
            )
            return
        if any(account.shared_memory != name_shared_memory() for account in accounts):
            # Each would map a file of its own by the same name, and a chunk lack its workers' shares.
            self._turn_off(
                "a worker runs on another host, or in a container with a /dev/shm of its own, and the "
                "CPU tier is shared memory of one host. Run the workers of an engine where the engine "
                "runs, or use mode=direct"
            )
            return
        # Identifying weights reads them once if they are new here: not on the engine's way up.
        threading.Thread(
            target=self._bind, args=(accounts,), name="prefixstore-identify", daemon=True
        ).start()

    def _bind(self, accounts: list[WorkerAccount]) -> None:
        try:
            assert self._tier is not None, "called in the scheduler's process"
            digests = WeightDigests(
                digest_memory("weights"), full=_reads_in_full(self._engine_config)
            )
            fields = {
                **scheduler_fields(self._engine_config, self._cache_config, digests=digests),
                **join_accounts(accounts),
            }
            self.namespace_fields = fields
            layouts = [account.layout for account in accounts]
            self._tier.bind(
                fields,
                spans=join_workers(layouts[:1] if self._tier.replicated_layout else layouts),
                element_bytes=accounts[0].element_bytes,
            )
        except PrefixStoreError as error:
            self._turn_off(str(error))
        except Exception:
            logger.exception("cannot work out the namespace")
            self._turn_off("the namespace could not be worked out; the log has the traceback")

    @property
    def store_state(self) -> tuple[str, str]:
        """The store's state as the metrics name it, and why it is not on; in the scheduler's process."""
        assert self._tier is not None, "only the scheduler's process has a tier"
        return self._tier.state

    @property
    def slots(self) -> int:
        """How many chunks the CPU tier has room for; in the scheduler's process."""
        assert self._tier is not None, "only the scheduler's process has a tier"
        return self._tier.slots

    def _turn_off(self, reason: str) -> None:
        if self._tier is not None:
            self._tier.turn_off(reason)

    @override
    def on_new_request(self, request: "Request") -> None:
        super().on_new_request(request)
        if self._tier is None:
            return
        # A block hash knows a picture by an id that the caller may have given it, an adapter by its name
        # and path, not by its weights, and of embeddings neither their dtype nor which of them are used.
        use = self._begin_use(request) if request.lora_request is not None else None
        if _brings_more_than_tokens(request) or (request.lora_request is not None and use is None):
            self._tier.bypass(request.request_id)
        elif use is not None:
            self._tier.adapt(request.request_id, use)

    @guarded(_no_use)
    def _begin_use(self, request: "Request") -> AdapterUse | None:
        if self._adapters is None:
            return None
        return self._adapters.begin(request.request_id, request.lora_request)

    # Calls to the engine that vLLM has no hook for.

    @guarded(_nothing_to_tell)
    def adapter_loading(self, lora: "LoRARequest") -> Callable[[], None]:
        """Take note that workers are told to load an adapter; returns what to call once they have."""
        if self._adapters is None:
            return _nothing
        return functools.partial(self._adapter_loaded, self._adapters.mention(lora))

    @guarded(lambda: None)
    def _adapter_loaded(self, use: AdapterUse) -> None:
        if self._adapters is not None:
            self._adapters.loaded(use)

    @guarded(lambda: None)
    def adapter_removed(self, adapter_id: int) -> None:
        """Take note that workers were told to drop an adapter."""
        if self._adapters is not None:
            self._adapters.removed(adapter_id)

    @guarded(lambda: None)
    def adapter_pinned(self, adapter_id: int) -> None:
        """Take note that workers were told to keep an adapter."""
        if self._adapters is not None:
            self._adapters.pinned(adapter_id)

    @guarded(lambda: None)
    def workers_called(self, method: str) -> None:
        """Turn the store off: the workers may have other weights from here on."""
        self._turn_off(
            f"collective_rpc called {method!r} of the workers, which may have replaced their weights. "
            "Restart the engine to use the store again"
        )

    @override
    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if request.num_preemptions != self._preemptions.get(request.request_id, 0):
            # vLLM asserts that a request has no load in the step that tells of its preemption; after a
            # reset with running requests it asks in that very step.
            self._preemptions[request.request_id] = request.num_preemptions
            return None, False
        matched, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if matched is not None:
            self._accounted[request.request_id] = num_computed_tokens
            if self._boundaries is not None:
                self._begin_boundaries(request, num_computed_tokens + matched)
        return matched, is_async

    @override
    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if request.request_id in self._accounted:
            self._accounted[request.request_id] += num_external_tokens

    @guarded(lambda: None)
    def _begin_boundaries(self, request: "Request", computed_tokens: int) -> None:
        assert self._boundaries is not None, "checked by the caller"
        self._boundaries.begin(request, computed_tokens=computed_tokens)

    @override
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> "KVConnectorMetadata":
        if not self._forget_blocks(scheduler_output):
            self._turn_off("vLLM's account of a session's blocks cannot be corrected")
        metadata = super().build_connector_meta(scheduler_output)
        self._begin_step(scheduler_output)
        return metadata

    @guarded(lambda: False)
    def _forget_blocks(self, scheduler_output: "SchedulerOutput") -> bool:
        forget_blocks(self.scheduler, [new.req_id for new in scheduler_output.scheduled_new_reqs])
        return True

    @guarded(lambda: None)
    def _begin_step(self, scheduler_output: "SchedulerOutput") -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        if self._tier is not None:
            # A request that decodes computes one token a step.
            self._tier.prefill.begin_step(
                sum(tokens for tokens in scheduled.values() if tokens > 1),
                now_s=CLOCK.monotonic_s(),
            )
        for request in scheduler_output.scheduled_new_reqs:
            self._begin_request(request.req_id, request.num_computed_tokens)
            if self._tier is not None and _brings_more_than_tokens(request):
                self._tier.bypass(request.req_id)  # A session's later input may bring a picture.
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids:
                self._begin_request(request_id, computed)
        for request_id in scheduler_output.finished_req_ids:
            self._accounted.pop(request_id, None)
            self._preemptions.pop(request_id, None)
        if self._boundaries is not None:
            self._boundaries.end_step(scheduled)
            for request_id in scheduler_output.finished_req_ids:
                self._boundaries.forget(request_id)

    def _begin_request(self, request_id: str, computed_tokens: int) -> None:
        """Take note that the step computes for a request, for the first time or again."""
        if self._tier is not None:
            self._tier.scheduled(request_id)
        self._check_origin(request_id, computed_tokens)

    def _check_origin(self, request_id: str, computed_tokens: int) -> None:
        """Turn the store off when KV came from elsewhere, as from another connector beside this one.

        Storing it would vouch for it, and what is computed after it depends on it.
        """
        accounted = self._accounted.pop(request_id, computed_tokens)
        if computed_tokens - accounted >= self._engine_config.cache_config.block_size:
            self._turn_off(
                f"another connector loaded {computed_tokens - accounted} tokens of KV, and prefixstore "
                "stores only what the engine computed or what it loaded itself. Run it without the other "
                "connector, or beside one that only saves"
            )

    @override
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        if self._tier is not None:
            self._tier.prefill.end_step(now_s=CLOCK.monotonic_s())
        super().update_connector_output(connector_output)

    @override
    def reset_cache(self) -> bool | None:
        # vLLM calls this when weights were updated or the engine slept, and keeps lower tiers on
        # purpose. What the model computes from now on may belong to another namespace, whatever becomes of
        # the reset.
        self._turn_off(
            "the engine's cache was reset, as after a weight update: what the store holds may be "
            "of other weights. Restart the engine to use the store again"
        )
        return super().reset_cache()

    # In the API server's process.

    @classmethod
    @override
    def build_prom_metrics(
        cls, vllm_config: "VllmConfig", *args: Any, **kwargs: Any
    ) -> "KVConnectorPromMetrics":
        register_name(cls.__name__, cls.__module__)
        if _is_direct(vllm_config):
            # The same names are observed, so the same are declared: those of a tier.
            vllm_config = copy.copy(vllm_config)
            vllm_config.kv_transfer_config = copy.copy(vllm_config.kv_transfer_config)
        _expand_options(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)


def _make_adapters(config: "VllmConfig") -> Adapters | None:
    """Return the engine's adapters, if it has any and they are to be stored; options are expanded."""
    transfer = config.kv_transfer_config
    assert transfer is not None, "vLLM builds a connector from it"
    (tier,) = transfer.kv_connector_extra_config["secondary_tiers"]
    if tier.get("adapters") != "content" or config.lora_config is None:
        return None
    return Adapters(
        capacity=config.lora_config.max_cpu_loras or config.lora_config.max_loras,
        settings=lora_settings(config.lora_config),
        digests=WeightDigests(digest_memory("adapters"), full=_reads_in_full(config)),
        clock=CLOCK,
    )


def _brings_more_than_tokens(request: Any) -> bool:
    """Whether a request, or what a step takes of one, has pictures, sound or embeddings in its prompt."""
    return bool(request.mm_features) or getattr(request, "prompt_embeds", None) is not None


def _is_direct(config: "VllmConfig") -> bool:
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector_extra_config.get("mode") == "direct"


def _expand_options(config: "VllmConfig") -> None:
    """Replace our options by vLLM's in an engine's config; every process of it does the same."""
    transfer = config.kv_transfer_config
    assert transfer is not None, "vLLM builds a connector from it"
    transfer.kv_connector_extra_config = expand(
        transfer.kv_connector_extra_config, machine=machine_memory()
    )


def _shares_prefixes(config: "VllmConfig") -> bool:
    """Whether windows and states inside a prompt are wanted; after the options were expanded.

    Not with speculative decoding, where the store is off: shorter steps would bring nothing.
    """
    transfer = config.kv_transfer_config
    assert transfer is not None, "vLLM builds a connector from it"
    (tier,) = transfer.kv_connector_extra_config["secondary_tiers"]
    return bool(tier.get("shared_prefixes", True)) and config.speculative_config is None


def _reads_in_full(config: "VllmConfig") -> bool:
    """Whether weights are to be read at every start; after the options were expanded."""
    transfer = config.kv_transfer_config
    assert transfer is not None, "vLLM builds a connector from it"
    (tier,) = transfer.kv_connector_extra_config["secondary_tiers"]
    return bool(tier.get("weights") == "full")


def _share_engine_log() -> None:
    """Let our log go where, and look as, the engine's does."""
    ours, engine = logging.getLogger("prefixstore"), logging.getLogger("vllm")
    if not ours.handlers and engine.handlers:
        ours.handlers = list(engine.handlers)
        ours.setLevel(engine.getEffectiveLevel())
        ours.propagate = False


def _find_tier(connector: OffloadingConnector) -> PrefixStoreTier:
    manager = connector.scheduler.manager
    assert isinstance(manager, TieringOffloadingManager), "our spec builds no other"
    for tier in manager.secondary_tiers:
        if isinstance(tier, PrefixStoreTier):
            return tier
    raise AssertionError("the options were expanded with our tier in them")
