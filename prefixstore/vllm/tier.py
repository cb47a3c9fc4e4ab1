"""Our tier below vLLM's CPU tier, in the scheduler process.

vLLM calls every method here on its scheduler thread and expects none to block
(vllm/v1/kv_offload/tiering/base.py). So this file only keeps books: what was asked
(``prefixstore.vllm.lookups``), what is in flight (``prefixstore.ioproc.client``), and which slots of
the CPU tier a payload is gathered from or scattered to.

A tier is **bound** once it knows its namespace and its slot layout: at once when both are given in its
options, else when the workers have told the front door. Until then everything is a miss.
"""

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from typing_extensions import override
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    ParentManager,
    SecondaryTierManager,
    TransferJob,
)

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import InvalidError
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import (
    Completion,
    FindDone,
    LoadDone,
    StoreDone,
    StoreTarget,
)
from prefixstore.keys import Fields, Key, kv_group
from prefixstore.vllm import metrics
from prefixstore.vllm.adapters import Adapters, AdapterUse
from prefixstore.vllm.admission import Admission
from prefixstore.vllm.events import CHANGES_MAX, OriginalKeys, events_of
from prefixstore.vllm.fingerprint import bare_fields
from prefixstore.vllm.guard import guarded
from prefixstore.vllm.layout import Span
from prefixstore.vllm.lookups import Answer, Question, Reach, RequestLookup
from prefixstore.vllm.machine import index_dir
from prefixstore.vllm.options import FRONT_DOOR, TierOptions
from prefixstore.vllm.reoffers import Place, Reoffers, pin_chunks
from prefixstore.vllm.requests import TierRequest
from prefixstore.vllm.results import load_result, store_result
from prefixstore.vllm.slots import Slots
from prefixstore.vllm.worth import PrefillMeter

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

__all__ = ["PrefixStoreTier"]

logger = logging.getLogger("prefixstore")

YIELD_S = 50e-6
"""How long the scheduler lets go of the GIL in a step while jobs are in flight. The interpreter's own
switch interval, 5 ms, would be paid for every message and every chunk."""

ANSWERS = {
    Answer.MISS: LookupResult.MISS,
    Answer.HIT: LookupResult.HIT,
    Answer.RETRY: LookupResult.RETRY,
}


def _error() -> str | None:
    """Why a store was not tried whose attempt failed."""
    return "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding:
    """What a bound tier works with."""

    client: IoClient
    slots: Slots


class PrefixStoreTier(SecondaryTierManager):
    """A ``SecondaryTierManager`` whose chunks live in a prefixstore root.

    Every method is for vLLM's scheduler thread, but ``bind`` and ``turn_off``.

    Attributes:
        replicated_layout: Whether all workers share one copy of a chunk in the slot.
        reaches: What a prompt needs of each KV group; the front door sees more of it than a tier does.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: "BackpressureDetector | None" = None,
        *,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.replicated_layout = offloading_spec.replicated_layout
        blocks = offloading_spec.blocks_per_chunk
        self.reaches = {
            group.group_id: Reach(chunk_tokens=group.tokens_per_block * blocks, is_guessed=True)
            for group in offloading_spec.config.groups
        }
        is_behind_front_door = bool(options.pop(FRONT_DOOR, False))
        self._options = TierOptions.from_mapping(options)
        if not is_behind_front_door and self._options.namespace is None:
            raise InvalidError(
                "secondary_tiers: a PrefixStoreTier under vLLM's own spec sees neither weights nor "
                "layout, so it needs a 'namespace': a name that you change whenever anything that "
                "decides KV changes. PrefixStoreConnector works it out by itself"
            )
        if self._options.locality is not None:
            self.locality = Locality(self._options.locality)
        self._announces = (
            self._options.enable_kv_events
            and offloading_spec.kv_events_config.enable_kv_cache_events
        )
        if self._options.mode != "tier":
            raise InvalidError(
                f"secondary_tiers: mode={self._options.mode} is for PrefixStoreConnector, which then "
                "builds no tier"
            )
        self._clock = clock or SystemClock()
        self._metrics = metrics.TierMetrics()
        self._metrics.set_state("opening")
        self._view = primary_kv_view
        self._admission = Admission(
            slots=(primary_kv_view.shape or (0,))[0],
            policy=self._options.load_policy,
            observed=self._metrics,
        )
        self._adapters: Adapters | None = None
        self._requests: dict[str, TierRequest] = {}
        self._asking: set[str] = set()  # Requests with questions to put at the step's end.
        self._questions: dict[int, tuple[str, Question]] = {}
        self._next_ticket = 0
        self._step = 0
        self._results: list[JobResult] = []
        self._reoffers = Reoffers()
        self._storing: dict[int, dict[Key, Place]] = {}
        self._renamed: dict[int, dict[Key, Key]] = {}  # Load → the store's key → vLLM's.
        self._original_keys = OriginalKeys()
        self._binding: _Binding | None = None
        self._off_reason: str | None = None
        self._saved_bytes_reported = 0
        if self._options.namespace is not None:
            self._bind_bare(offloading_spec)

    # Called by the front door.

    @property
    def state(self) -> tuple[str, str]:
        """The store's state as the metrics name it, and why it is not on."""
        if self._off_reason is not None:
            return "off", self._off_reason
        if self._binding is None:
            return "opening", ""
        return self._binding.client.state, self._binding.client.reason

    @property
    def slots(self) -> int:
        """How many chunks the CPU tier has room for."""
        return self._admission.slots

    @property
    def prefill(self) -> PrefillMeter:
        """Measures how fast prompts are computed; the front door tells it of the steps."""
        return self._admission.prefill

    def bind(
        self, fields: Fields, *, spans: Mapping[int, Sequence[Span]], element_bytes: int
    ) -> None:
        """Open the store: from now on lookups may hit.

        Args:
            fields: The namespace, in full.
            spans: For each KV group, the bytes of a slot that its chunks own.
            element_bytes: The size of one KV element.
        """
        assert self._binding is None, "a tier is bound once"
        slots = Slots(self._view, spans=spans, element_bytes=element_bytes)
        client = IoClient(
            StoreTarget(
                root=self._options.root,
                namespace=msgspec.json.encode(dict(fields)),
                options=msgspec.json.encode(self._options.store_config(index_dir=index_dir())),
            ),
            replace(
                self._options.limits(max(slots.payload_bytes.values())),
                changes_max=CHANGES_MAX if self._announces else 0,
            ),
            clock=self._clock,
        )
        self._binding = _Binding(client=client, slots=slots)

    def turn_off(self, reason: str) -> None:
        """Neither load nor store any more; what is in flight still ends."""
        if self._off_reason is None:
            logger.warning("store is off: %s", reason)
        self._off_reason = reason
        self._metrics.set_state("off")

    def bypass(self, request_id: str) -> None:
        """Neither load nor store for one request: its KV depends on more than the namespace."""
        if (request := self._requests.get(request_id)) is not None:
            request.bypassed = True

    def serve_adapters(self, adapters: Adapters) -> None:
        """Take the engine's adapters; ``adapt`` names those of requests. Owned by the tier from now on."""
        self._adapters = adapters

    def adapt(self, request_id: str, use: AdapterUse) -> None:
        """Load and store for one request under keys that its adapter's content is part of."""
        if (request := self._requests.get(request_id)) is not None:
            request.use = use

    def scheduled(self, request_id: str) -> None:
        """End what was promised to a request that is scheduled, and note that its adapter is used now."""
        self._admission.release(request_id)
        if self._adapters is not None:
            self._adapters.scheduled(request_id)

    def count_failure(self, callback: str) -> None:
        """Count a callback that failed and was answered with its safe value."""
        self._metrics.count(metrics.FAILED_CALLBACKS, callback)

    # Called by vLLM.

    @override
    @guarded(RequestOffloadingContext)
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._requests[req_context.req_id] = TierRequest(req_context, RequestLookup(self.reaches))
        return RequestOffloadingContext()

    @override
    @guarded(lambda: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        binding = self._serving()
        request = self._requests.get(req_context.req_id)
        if binding is None or request is None:
            return LookupResult.MISS
        now_s = self._clock.monotonic_s()
        if (refusal := request.refuse(now_s)) is not None:
            return ANSWERS[refusal]
        end_token = req_context.get_offload_key_position(key)
        if end_token is None or kv_group(Key(key)) not in binding.slots.spans:
            return LookupResult.MISS
        if request.lookup.undecided and request.decided_in_step != self._step:
            # Nothing comes free within a step, and the scheduler asks for thousands of keys in one.
            request.decided_in_step = self._step
            sizes = binding.slots.payload_bytes
            self._admission.decide(
                req_context.req_id, request.lookup, payload_bytes=sizes, now_s=now_s
            )
        if (answer := request.lookup.ask(Key(key), end_token)) is Answer.RETRY:
            self._asking.add(req_context.req_id)
        return ANSWERS[answer]

    @override
    @guarded(lambda: None)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._step += 1
        for request_id in context.new_req_ids:
            self._admission.release(request_id)
        if (binding := self._binding) is None:
            return
        if self._results or binding.client.busy or self._is_proving:
            # An engine with nothing else to do turns without a pause, and would keep the GIL from the
            # pump that it waits for.
            self._clock.sleep(YIELD_S)
        asking, self._asking = self._asking, set()
        for request_id in asking:
            if (request := self._requests.get(request_id)) is not None:
                self._put_questions(binding, request)

    @override
    @guarded(lambda: None)
    def serve_external_requests(self, parent: ParentManager) -> None:
        if not self._reoffers or (binding := self._serving()) is None:
            return
        if binding.client.state != "on" or not binding.client.ready:
            return
        asked = self._reoffers.due(self._clock.monotonic_s(), slots=self._admission.slots)
        if not asked:
            return
        self._next_ticket += 1
        job = pin_chunks(parent, asked, request_id=f"prefixstore-reoffer-{self._next_ticket}")
        if job is not None:
            self._reoffers.started(job.job_id)
            self._metrics.count(metrics.STORES_REOFFERED, by=len(job.keys))
            self._submit(job, lambda: self._submit_chunks(job, asked))

    @override
    def submit_load(self, job_metadata: TransferJob) -> None:
        if not self._try_load(job_metadata):
            self._results.append(JobResult(job_id=job_metadata.job_id, success=False))

    @override
    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, functools.partial(self._submit_store, job_metadata))

    @override
    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._poll()
        results, self._results = self._results, []
        return results

    @override
    @guarded(list[OffloadingEvent])
    def take_events(self) -> list[OffloadingEvent]:
        if not self._announces or self._binding is None:
            return []
        changes, lost = self._binding.client.take_changes()
        self._metrics.count(metrics.EVENTS_LOST, by=lost)
        return events_of(changes, originals=self._original_keys, locality=self.locality)

    @override
    @guarded(lambda: False)
    def has_pending_work(self) -> bool:
        client_busy = self._binding is not None and self._binding.client.busy
        return bool(self._results) or client_busy or self._is_proving

    @override
    @guarded(lambda: None)
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if (request := self._requests.get(req_context.req_id)) is not None:
            self._touch(request, map(Key, keys))

    @override
    @guarded(lambda: None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._admission.release(req_context.req_id)
        if self._adapters is not None:
            self._adapters.finish(req_context.req_id)
        if (request := self._requests.pop(req_context.req_id, None)) is not None:
            # vLLM reports no use that its GPU or CPU cache served, so the hottest prefix would look
            # coldest. The whole chain is as recent as this request.
            self._touch(request, request.chain())

    @override
    @guarded(lambda: None)
    def drain_jobs(self) -> None:
        # No proof is worth a wait where nothing is stored any more.
        self._hear_proofs(last_s=self._options.drain_s if self._off_reason is None else 0.0)
        if self._binding is not None:
            for completion in self._binding.client.drain(self._options.drain_s):
                self._take(completion)

    @override
    @guarded(lambda: None)
    def shutdown(self) -> None:
        binding, self._binding = self._binding, None
        if self._adapters is not None:
            self._adapters.close()
        if binding is not None:
            binding.client.close(self._options.drain_s)

    @classmethod
    @override
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return metrics.metric_definitions()

    @override
    @guarded(lambda: None)
    def get_stats(self) -> "OffloadingConnectorStats | None":
        if (binding := self._binding) is not None:
            if self._off_reason is None:
                self._metrics.set_state(binding.client.state)
            saved = binding.client.counters().get("compression_saved_bytes", 0)
            self._metrics.count(
                metrics.COMPRESSION_SAVED_BYTES, by=max(0, saved - self._saved_bytes_reported)
            )
            self._saved_bytes_reported = saved
        return self._metrics.take()

    # Inside.

    def _bind_bare(self, spec: "OffloadingSpec") -> None:
        """Bind without the front door: the whole slot is the payload, the user names the namespace."""
        config = spec.config
        fields = bare_fields(self._options.namespace, config)
        owned = [Span(0, (self._view.shape or (0, 0))[1])]
        self.bind(fields, spans={group.group_id: owned for group in config.groups}, element_bytes=2)

    def _serving(self) -> _Binding | None:
        return self._binding if self._off_reason is None else None

    @property
    def _is_proving(self) -> bool:
        return self._adapters is not None and self._adapters.busy

    def _put_questions(self, binding: _Binding, request: TierRequest) -> None:
        """Ask the store about the keys that a request's lookups came to in this step."""
        for question in request.lookup.take_questions():
            if not self._try_find(binding, request, question, proved=request.use is None):
                request.miss(question)  # Without a verdict it would wait for ever.

    @guarded(lambda: False)
    def _try_find(
        self, binding: _Binding | None, request: TierRequest, question: Question, *, proved: bool
    ) -> bool:
        """Ask the store, for an adapter's request once its content is proved; False: it was not asked."""
        if binding is None or not binding.client.ready:
            return False
        request_id = request.context.req_id
        if request.use is not None and not proved:
            then = functools.partial(self._find_adapted, request_id, question)
            self._prove(request.use, then, patience_s=self._options.find_deadline_s)
            return True
        keys = [request.name(key) for key in question.keys]
        self._next_ticket += 1
        binding.client.find(self._next_ticket, keys, chained=question.chained)
        self._questions[self._next_ticket] = (request_id, question)
        return True

    @guarded(lambda: None)
    def _find_adapted(self, request_id: str, question: Question, digest: bytes | None) -> None:
        if (request := self._requests.get(request_id)) is not None:
            binding = self._serving() if digest is not None else None
            if not self._try_find(binding, request, question, proved=True):
                request.miss(question)

    def _prove(
        self, use: AdapterUse, then: Callable[[bytes | None], None], *, patience_s: float
    ) -> None:
        assert self._adapters is not None, "uses come from it"
        self._adapters.prove(use, then, patience_s=patience_s)

    def _touch(self, request: TierRequest, keys: Iterable[Key]) -> None:
        """Note the use of a request's chunks, as far as the store can know them."""
        if request.is_named and (binding := self._serving()) is not None:
            binding.client.touch([request.name(key) for key in keys])

    @guarded(lambda: False)
    def _try_load(self, job: TransferJob) -> bool:
        binding = self._serving()
        request = self._requests.get(job.req_context.req_id)
        if binding is None or request is None:
            return False
        binding.client.load(
            job.job_id,
            [
                binding.slots.load(request.name(Key(key)), int(slot))
                for key, slot in zip(job.keys, job.chunk_ids, strict=True)
            ],
        )
        self._admission.loads.begin(job.job_id, now_s=self._clock.monotonic_s())
        if request.use is not None:
            self._renamed[job.job_id] = {request.name(Key(key)): Key(key) for key in job.keys}
        return True

    def _submit(self, job: TransferJob, attempt: Callable[[], str | None]) -> None:
        """Submit a store by ``attempt``, which returns why not; what is refused ends here."""
        if (refused := self._try_store(job, attempt)) is not None:
            self._reoffers.ended(
                job.job_id, self._clock.monotonic_s(), stored=0, skipped=len(job.keys)
            )
            self._results.append(
                JobResult(
                    job_id=job.job_id,
                    success=refused == "bypassed",  # On purpose: nothing failed.
                    transfer_bytes=0,
                )
            )

    @guarded(_error)
    def _try_store(self, job: TransferJob, attempt: Callable[[], str | None]) -> str | None:
        refused = attempt()
        if refused is not None:
            self._metrics.count(metrics.STORES_SKIPPED, refused, by=len(job.keys))
        return refused

    def _submit_store(self, job: TransferJob) -> str | None:
        request = self._requests.get(job.req_context.req_id)
        if request is None or request.bypassed:
            return "bypassed"
        places = request.places(job.keys)
        if request.use is None:
            return self._submit_chunks(job, places)
        self._prove(
            request.use,
            functools.partial(self._submit_adapted, job, request, places),
            patience_s=self._options.store_deadline_s,
        )
        return None

    @guarded(lambda: None)
    def _submit_adapted(
        self, job: TransferJob, request: TierRequest, places: dict[Key, Place], digest: bytes | None
    ) -> None:
        """Submit chunks whose KV was just proved to be of their adapter's content."""
        self._submit(
            job, lambda: "adapter" if digest is None else self._submit_chunks(job, places, request)
        )

    def _submit_chunks(
        self, job: TransferJob, places: dict[Key, Place], adapted: TierRequest | None = None
    ) -> str | None:
        """Submit the chunks of a job, whose places are known, or return why not.

        Those of an adapter are not offered again: by then nobody could say what they were computed with.
        """
        if (binding := self._serving()) is None:
            return self._refuse({} if adapted else places, "off")
        name = adapted.name if adapted else lambda key: key
        chunks = []
        for key, slot in zip(map(Key, job.keys), job.chunk_ids, strict=True):
            end, parent = places[key]
            parent = None if parent is None else name(parent)
            chunks.append(binding.slots.store(name(key), int(slot), end_token=end, parent=parent))
        # vLLM hands over a set: parents before children, so that a crash leaves no gap.
        chunks.sort(key=lambda chunk: chunk.end_token)
        if adapted:
            self._original_keys.learn({name(Key(key)): Key(key) for key in job.keys})
        if not binding.client.store(job.job_id, chunks):
            return self._refuse({} if adapted else places, "busy")
        self._storing[job.job_id] = {} if adapted else places
        return None

    def _refuse(self, places: Mapping[Key, Place], reason: str) -> str:
        """Remember chunks that the store may want later, if there will be a later; returns the reason."""
        if self._off_reason is None and not self._options.read_only:
            self._reoffers.refused(places, reason)
        return reason

    @guarded(lambda: None)
    def _poll(self) -> None:
        self._hear_proofs()
        if self._binding is not None:
            for completion in self._binding.client.poll():
                self._take(completion)

    @guarded(lambda: None)
    def _hear_proofs(self, *, last_s: float | None = None) -> None:
        """Hear of proofs that have ended; with ``last_s``, for so long, and then of none that was asked for."""
        if self._adapters is not None and last_s is None:
            self._adapters.poll()
        elif self._adapters is not None and last_s is not None:
            self._adapters.give_up(last_s)

    @guarded(lambda: None)
    def _take(self, completion: Completion) -> None:
        """Account for one completion; guarded alone, so that one that fails costs no other."""
        match completion:
            case FindDone():
                request_id, question = self._questions.pop(completion.ticket)
                if (request := self._requests.get(request_id)) is not None:
                    request.lookup.take_verdict(question, completion.present)
            case LoadDone():
                self._admission.loads.end(
                    completion.ticket,
                    landed_bytes=completion.landed_bytes,
                    elapsed_s=completion.elapsed_s,
                )
                for reason in completion.missed.values():
                    self._metrics.count(metrics.LOAD_MISSES, reason)
                originals = self._renamed.pop(completion.ticket, {})
                self._results.append(load_result(completion, originals))
            case StoreDone():
                places = self._storing.pop(completion.ticket, {})
                for key, reason in completion.skipped.items():
                    self._metrics.count(metrics.STORES_SKIPPED, reason)
                    if key in places:
                        self._refuse({key: places[key]}, reason)
                self._reoffers.ended(
                    completion.ticket,
                    self._clock.monotonic_s(),
                    stored=len(completion.stored) + len(completion.existed),
                    skipped=len(completion.skipped),
                )
                self._results.append(store_result(completion))
