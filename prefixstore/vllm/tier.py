"""Our tier below vLLM's CPU tier, in the scheduler process.

vLLM calls every method here on its scheduler thread and expects none to block
(vllm/v1/kv_offload/tiering/base.py). So this file only keeps books: what was asked
(``prefixstore.vllm.lookups``), what is in flight (``prefixstore.ioproc.client``), and which slots of
the CPU tier a payload is gathered from or scattered to.

A tier is **bound** once it knows its namespace and its slot layout: at once when both are given in its
options, else when the workers have told the front door. Until then everything is a miss.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from prefixstore.index.place import default_index_dir
from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import (
    ChunkLoad,
    ChunkStore,
    Completion,
    FindDone,
    LoadDone,
    StoreDone,
    StoreTarget,
)
from prefixstore.keys import Fields, Key, kv_group
from prefixstore.vllm import metrics
from prefixstore.vllm.compat import request_keys
from prefixstore.vllm.events import CHANGES_MAX, events_of
from prefixstore.vllm.fingerprint import bare_fields
from prefixstore.vllm.guard import guarded
from prefixstore.vllm.layout import Span, gather, scatter
from prefixstore.vllm.lookups import Answer, Budget, Chains, Question, RequestLookup
from prefixstore.vllm.options import FRONT_DOOR, TierOptions
from prefixstore.vllm.reoffers import Place, Reoffers, pin_chunks
from prefixstore.vllm.worth import LoadWorth, PrefillMeter

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

__all__ = ["PrefixStoreTier"]

logger = logging.getLogger("prefixstore")

ADMISSION_PATIENCE_S = 20.0
"""How long a match waits for room in the CPU tier before it is recomputed instead.

Room comes free when another request is scheduled: seconds on a busy engine."""

YIELD_S = 50e-6
"""How long the scheduler lets go of the GIL in a step while jobs are in flight. The interpreter's own
switch interval, 5 ms, would be paid for every message and every chunk."""

ANSWERS = {
    Answer.MISS: LookupResult.MISS,
    Answer.HIT: LookupResult.HIT,
    Answer.RETRY: LookupResult.RETRY,
}


@dataclass(slots=True)
class _Request:
    """What the tier remembers of one request, from its arrival to its end."""

    context: ReqContext
    lookup: RequestLookup = field(default_factory=RequestLookup)
    chains: Chains = field(default_factory=Chains)
    bypassed: bool = False
    waits_since_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding:
    """What a bound tier works with."""

    client: IoClient
    spans: Mapping[int, Sequence[Span]]
    payload_bytes: Mapping[int, int]
    element_bytes: int


class PrefixStoreTier(SecondaryTierManager):
    """A ``SecondaryTierManager`` whose chunks live in a prefixstore root.

    Every method is for vLLM's scheduler thread, but ``bind`` and ``turn_off``.

    Attributes:
        replicated_layout: Whether all workers share one copy of a chunk in the slot.
        prefill: Measures how fast prompts are computed; the front door tells it of the steps.
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
        slots, self._slot_bytes = primary_kv_view.shape or (0, 0)
        # The address stays valid for as long as the view is held, which the base class does.
        self._slots_address = (
            ctypes.addressof(ctypes.c_char.from_buffer(primary_kv_view)) if slots else 0
        )
        self._budget = Budget(slots)
        self.prefill = PrefillMeter()
        self._worth = LoadWorth(prefill=self.prefill.rate)
        self._requests: dict[str, _Request] = {}
        self._asking: set[str] = set()  # Requests with questions to put at the step's end.
        self._questions: dict[int, tuple[str, Question]] = {}
        self._next_ticket = 0
        self._results: list[JobResult] = []
        self._reoffers = Reoffers()
        self._storing: dict[int, dict[Key, Place]] = {}
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
        return self._budget.slots

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
        payload_bytes = {
            group: sum(span.length for span in owned) for group, owned in spans.items()
        }
        client = IoClient(
            StoreTarget(
                root=self._options.root,
                namespace=msgspec.json.encode(dict(fields)),
                options=msgspec.json.encode(self._options.store_config(index_dir=_index_dir())),
            ),
            replace(
                self._options.limits(max(payload_bytes.values())),
                changes_max=CHANGES_MAX if self._announces else 0,
            ),
            clock=self._clock,
        )
        self._binding = _Binding(
            client=client, spans=spans, payload_bytes=payload_bytes, element_bytes=element_bytes
        )

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

    def count_failure(self, callback: str) -> None:
        """Count a callback that failed and was answered with its safe value."""
        self._metrics.count(metrics.FAILED_CALLBACKS, callback)

    # Called by vLLM.

    @override
    @guarded(RequestOffloadingContext)
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._requests[req_context.req_id] = _Request(req_context)
        return RequestOffloadingContext()

    @override
    @guarded(lambda: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        binding = self._serving()
        request = self._requests.get(req_context.req_id)
        if binding is None or request is None or request.bypassed:
            return LookupResult.MISS
        end_token = req_context.get_offload_key_position(key)
        if end_token is None or kv_group(Key(key)) not in binding.spans:
            return LookupResult.MISS
        if request.lookup.undecided:
            self._decide(req_context.req_id, request)
        answer = request.lookup.ask(Key(key), end_token)
        if answer is Answer.RETRY:
            self._asking.add(req_context.req_id)
        return ANSWERS[answer]

    @override
    @guarded(lambda: None)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for request_id in context.new_req_ids:
            self._budget.release(request_id)
        if (binding := self._binding) is None:
            return
        if self._results or binding.client.busy:
            # An engine with nothing else to do turns without a pause, and would keep the GIL from the
            # pump that it waits for.
            self._clock.sleep(YIELD_S)
        asking, self._asking = self._asking, set()
        for request_id in asking:
            if (request := self._requests.get(request_id)) is not None:
                self._put_questions(binding, request_id, request)

    @override
    @guarded(lambda: None)
    def serve_external_requests(self, parent: ParentManager) -> None:
        if not self._reoffers or (binding := self._serving()) is None:
            return
        if binding.client.state != "on" or not binding.client.ready:
            return
        asked = self._reoffers.due(self._clock.monotonic_s(), slots=self._budget.slots)
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
        self._submit(job_metadata, lambda: self._submit_store(job_metadata))

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
        return events_of(changes, locality=self.locality)

    @override
    @guarded(lambda: False)
    def has_pending_work(self) -> bool:
        return bool(self._results) or (self._binding is not None and self._binding.client.busy)

    @override
    @guarded(lambda: None)
    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if (binding := self._serving()) is not None:
            binding.client.touch([Key(key) for key in keys])

    @override
    @guarded(lambda: None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._budget.release(req_context.req_id)
        request = self._requests.pop(req_context.req_id, None)
        binding = self._serving()
        if binding is None or request is None or request.bypassed:
            return
        # vLLM reports no use that its GPU or CPU cache served, so the hottest prefix would look
        # coldest. The whole chain is as recent as this request.
        binding.client.touch([key for key, _ in request_keys(req_context)])

    @override
    @guarded(lambda: None)
    def drain_jobs(self) -> None:
        if self._binding is not None:
            for completion in self._binding.client.drain(self._options.drain_s):
                self._take(completion)

    @override
    @guarded(lambda: None)
    def shutdown(self) -> None:
        binding, self._binding = self._binding, None
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
        owned = [Span(0, self._slot_bytes)]
        self.bind(fields, spans={group.group_id: owned for group in config.groups}, element_bytes=2)

    def _serving(self) -> _Binding | None:
        return self._binding if self._off_reason is None else None

    def _put_questions(self, binding: _Binding, request_id: str, request: _Request) -> None:
        """Ask the store about the keys that a request's lookups came to in this step."""
        for question in request.lookup.take_questions():
            if not binding.client.ready:
                request.lookup.take_verdict(question, [False] * len(question.keys))
                continue
            self._next_ticket += 1
            self._questions[self._next_ticket] = (request_id, question)
            binding.client.find(self._next_ticket, question.keys, chained=question.chained)

    def _decide(self, request_id: str, request: _Request) -> None:
        """Admit the match of a request whose verdicts are all in, if there is room for it."""
        wanted = request.lookup.wanted()
        if wanted and request.waits_since_s is None and not self._pays(request.lookup, wanted):
            request.lookup.decide(())
            self._metrics.count(metrics.DECLINED_HITS, "slower", by=len(wanted))
            return
        fitting = wanted[: max(0, self._budget.slots - request.lookup.hits)]
        if not fitting:
            request.lookup.decide(())
            self._metrics.count(metrics.DECLINED_HITS, "no_room", by=len(wanted))
            return
        now_s = self._clock.monotonic_s()
        if request.waits_since_s is None:
            request.waits_since_s = now_s
        if self._budget.reserve(request_id, len(fitting)):
            request.lookup.decide(fitting)
            self._metrics.count(metrics.DECLINED_HITS, "no_room", by=len(wanted) - len(fitting))
        elif now_s - request.waits_since_s > ADMISSION_PATIENCE_S:
            request.lookup.decide(())
            self._metrics.count(metrics.DECLINED_HITS, "no_room", by=len(wanted))
        else:
            return
        request.waits_since_s = None

    def _pays(self, lookup: RequestLookup, wanted: Sequence[Key]) -> bool:
        """Whether a match is worth loading, by what loads and prefills took so far."""
        if self._options.load_policy == "always":
            return True
        binding = self._serving()
        assert binding is not None, "a lookup is answered with a miss before"
        was_declining = self._worth.declining
        load_bytes = sum(binding.payload_bytes[kv_group(key)] for key in wanted)
        tokens = lookup.saved_tokens(wanted)
        pays = self._worth.pays(
            load_bytes=load_bytes, tokens=tokens, now_s=self._clock.monotonic_s()
        )
        if self._worth.declining != was_declining:
            logger.warning("%s", self._worth.account(load_bytes=load_bytes, tokens=tokens))
        return pays

    @guarded(lambda: False)
    def _try_load(self, job: TransferJob) -> bool:
        binding = self._serving()
        if binding is None:
            return False
        binding.client.load(
            job.job_id,
            [
                self._chunk_load(binding, Key(key), int(slot))
                for key, slot in zip(job.keys, job.chunk_ids, strict=True)
            ],
        )
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

    @guarded(lambda: _optional("error"))
    def _try_store(self, job: TransferJob, attempt: Callable[[], str | None]) -> str | None:
        refused = attempt()
        if refused is not None:
            self._metrics.count(metrics.STORES_SKIPPED, refused, by=len(job.keys))
        return refused

    def _submit_store(self, job: TransferJob) -> str | None:
        request = self._requests.get(job.req_context.req_id)
        if request is None or request.bypassed:
            return "bypassed"
        chains = request.chains
        chains.learn(request_keys(job.req_context, start=len(chains)))
        return self._submit_chunks(job, {Key(key): chains.place(Key(key)) for key in job.keys})

    def _submit_chunks(self, job: TransferJob, places: dict[Key, Place]) -> str | None:
        """Submit the chunks of a job, whose places are known, or return why not."""
        if (binding := self._serving()) is None:
            self._refuse(places, "off")
            return "off"
        chunks = [
            self._chunk_store(binding, Key(key), int(slot), *places[Key(key)])
            for key, slot in zip(job.keys, job.chunk_ids, strict=True)
        ]
        # vLLM hands over a set: parents before children, so that a crash leaves no gap.
        chunks.sort(key=lambda chunk: chunk.end_token)
        if not binding.client.store(job.job_id, chunks):
            self._refuse(places, "busy")
            return "busy"
        self._storing[job.job_id] = places
        return None

    def _refuse(self, places: Mapping[Key, Place], reason: str) -> None:
        """Remember chunks that the store may want later, if there will be a later."""
        if self._off_reason is None and not self._options.read_only:
            self._reoffers.refused(places, reason)

    def _chunk_load(self, binding: _Binding, key: Key, slot: int) -> ChunkLoad:
        group = kv_group(key)
        address, spans = self._slot_address(slot), binding.spans[group]
        return ChunkLoad(
            key=key,
            raw_bytes=binding.payload_bytes[group],
            land=lambda payload: scatter(payload, address, spans),
        )

    def _chunk_store(
        self, binding: _Binding, key: Key, slot: int, end: int, parent: Key | None
    ) -> ChunkStore:
        group = kv_group(key)
        address, spans = self._slot_address(slot), binding.spans[group]
        return ChunkStore(
            key=key,
            parent=parent,
            end_token=end,
            element_bytes=binding.element_bytes,
            raw_bytes=binding.payload_bytes[group],
            fill=lambda payload: gather(payload, address, spans),
        )

    def _slot_address(self, slot: int) -> int:
        assert 0 <= slot < self._budget.slots, f"slot {slot} of {self._budget.slots}"
        return self._slots_address + slot * self._slot_bytes

    @guarded(lambda: None)
    def _poll(self) -> None:
        if self._binding is not None:
            for completion in self._binding.client.poll():
                self._take(completion)

    @guarded(lambda: None)
    def _take(self, completion: Completion) -> None:
        """Account for one completion; guarded alone, so that one that fails costs no other."""
        match completion:
            case FindDone():
                request_id, question = self._questions.pop(completion.ticket)
                if (request := self._requests.get(request_id)) is not None:
                    request.lookup.take_verdict(question, completion.present)
            case LoadDone():
                self._worth.loads.note(completion.landed_bytes, completion.elapsed_s)
                for reason in completion.missed.values():
                    self._metrics.count(metrics.LOAD_MISSES, reason)
                self._results.append(
                    JobResult(
                        job_id=completion.ticket,
                        success=not completion.missed,
                        successful_keys=[OffloadKey(key) for key in completion.landed],
                        transfer_time=completion.elapsed_s,
                        transfer_bytes=completion.landed_bytes,
                    )
                )
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
                self._results.append(
                    JobResult(
                        job_id=completion.ticket,
                        success=not completion.skipped,
                        transfer_time=completion.elapsed_s,
                        transfer_bytes=completion.stored_bytes,
                    )
                )


def _index_dir() -> str | None:
    """Return the user's place for indexes; without one, the store works with one in memory."""
    try:
        return str(default_index_dir(os.environ))
    except InvalidError:
        return None


def _optional(reason: str | None) -> str | None:
    """The same, typed as a reason that may be missing."""
    return reason
