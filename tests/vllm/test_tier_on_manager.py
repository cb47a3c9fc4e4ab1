"""Our tier below vLLM's real tiering manager and CPU tier, driven the way its scheduler drives them.

No engine and no model: keys, slots and steps are real, and what a chunk holds is told by its key, so
that every byte that lands in a slot can be checked.
"""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.kv_offload.base import (
    ReqContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from prefixstore.errors import InvalidError
from prefixstore.vllm.adapters import Adapter, Adapters, AdapterUse
from prefixstore.vllm.residency import Stay
from prefixstore.vllm.spec import PrefixStoreSpec
from prefixstore.vllm.weights import WeightDigests
from prefixstore.vllm.worth import OBSERVATIONS_NEEDED
from tests.vllm.managers import CHUNK_BYTES, PATIENCE_S, make_config, prompt


def test_a_prompt_is_computed_once_and_loaded_by_the_next_engine(drive):
    """What one manager stored another finds, byte for byte."""
    first = drive()
    first.await_state("on")
    keys = prompt("a", 10)
    assert 0 == first.serve("r1", keys)
    first.settle()

    second = drive()
    second.await_state("on")

    assert 10 == second.serve("r2", keys)
    assert 5 == second.serve("r3", prompt("b", 8, after=keys[:5]))


def test_a_prefix_longer_than_the_cpu_tier_finishes(drive):
    """Twelve chunks through eight slots: what fits is loaded, the rest computed, in bounded steps."""
    first = drive()
    first.await_state("on")
    keys = prompt("a", 12)
    first.serve("r1", keys)
    first.settle()
    small = drive(slots=8)
    small.await_state("on")

    hits = small.serve("r2", keys)

    assert 0 < hits <= 8
    declined = small.tier.get_stats().data["data"]["vllm:prefixstore_declined_hits"]
    assert {("no_room",): 12 - 8} == declined


def test_fifty_waiting_prompts_finish_through_a_small_cpu_tier(drive):
    """Requests that wait together take turns in the CPU tier and none waits for ever."""
    first = drive(slots=512)
    first.await_state("on")
    shared = prompt("s", 4)
    prompts = {f"r{i}": prompt(f"p{i}", 8, after=shared if i % 2 else ()) for i in range(50)}
    for name, keys in prompts.items():
        first.serve(name, keys)
    first.settle()
    small = drive(slots=20)
    small.await_state("on")
    waiting = {name: small.begin(name, keys) for name, keys in prompts.items()}
    hits: dict[str, int] = {}

    def turn() -> bool:
        """One step: every waiting request is asked, the first that is ready is scheduled."""
        for name in list(waiting):
            found = small.scan(waiting[name], prompts[name])
            if found is not None:
                hits[name] = found
                context = waiting.pop(name)
                small.load(context, prompts[name][:found])
                small.manager.on_request_finished(context)
                return not waiting
        small.end_step()
        return not waiting

    small._until(turn, "all prompts to be scheduled")

    assert 50 == len(hits)
    assert 50 * 8 * 0.5 < sum(hits.values()), "most chunks came from the store"


@pytest.mark.parametrize(("policy", "loaded"), [("auto", 0), ("always", 6)])
def test_matches_that_lose_to_computing_are_declined(drive, policy, loaded):
    """Once loads were seen to take longer than prefills, a match is computed and counted."""
    first = drive()
    first.await_state("on")
    prompts = [prompt(f"p{i}", 6) for i in range(OBSERVATIONS_NEEDED + 1)]
    for i, keys in enumerate(prompts):
        first.serve(f"r{i}", keys)
    first.settle()
    second = drive(load_policy=policy)
    second.await_state("on")
    for step in range(OBSERVATIONS_NEEDED):  # A device that computes a million tokens in a blink.
        second.tier.prefill.begin_step(1_000_000, now_s=step)
        second.tier.prefill.end_step(now_s=step + 1e-6)

    hits = [second.serve(f"r{i}", keys) for i, keys in enumerate(prompts)]

    assert [6] * OBSERVATIONS_NEEDED == hits[:-1], "on first sight nothing is declined"
    assert loaded == hits[-1]
    stats = second.tier.get_stats().data["data"]
    declined = stats.get("vllm:prefixstore_declined_hits", {})
    assert ({} if policy == "always" else {("slower",): 6}) == declined


def test_a_request_that_leaves_while_it_waits_frees_its_room(drive):
    """An aborted request holds no promise of slots that others wait for."""
    first = drive()
    first.await_state("on")
    keys = prompt("a", 8)
    first.serve("r1", keys)
    first.settle()
    small = drive(slots=8)
    small.await_state("on")
    context = small.begin("aborted", keys)
    small._until(lambda: not small.scan(context, keys) and not small.end_step(), "a first scan")
    small.manager.on_request_finished(context)

    assert 8 == small.serve("r2", keys)


def test_a_request_that_waits_for_room_is_decided_once_a_step(drive, monkeypatch):
    """Its keys are asked for one by one in each step: their match is worked out for the first of them."""
    first = drive()
    first.await_state("on")
    prompts = [prompt("a", 6), prompt("b", 6)]
    for name, keys in zip("ab", prompts, strict=True):
        first.serve(name, keys)
    first.settle()
    small = drive(slots=8)
    small.await_state("on")
    contexts = [small.begin(name, keys) for name, keys in zip("ab", prompts, strict=True)]

    def one_waits() -> bool:
        for context, keys in zip(contexts, prompts, strict=True):
            small.scan(context, keys)
        small.end_step()
        return "b" in small.tier._admission._waits_since_s

    small._until(one_waits, "a wait for room")
    decided = []
    decide = small.tier._admission.decide
    monkeypatch.setattr(
        small.tier._admission,
        "decide",
        lambda *args, **kwargs: (decided.append(args[0]), decide(*args, **kwargs)),
    )

    for _ in range(3):
        assert small.scan(contexts[1], prompts[1]) is None
        small.end_step()

    assert ["b"] * 3 == decided


def test_recency_follows_requests_that_the_store_never_saw_loads_of(drive, tmp_path):
    """At a request's end its whole chain is touched, whoever served it."""
    driver = drive(touch_interval_s=0.0)
    driver.await_state("on")
    keys = prompt("a", 4)
    driver.serve("r1", keys)
    driver.settle()
    blobs = sorted((tmp_path / "root").glob("ns/*/*/*/*.kv"))
    for blob in blobs:
        os.utime(blob, (1_000_000_000, 1_000_000_000))

    driver.serve("r2", keys)  # From the CPU tier: the store is not asked.
    driver.settle()

    driver._until(
        lambda: all(blob.stat().st_mtime > 1_000_000_000 for blob in blobs), "touches on disk"
    )


class Broken:
    """Raises from everything that is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError(f"broken on purpose: {name}")


def test_no_failure_of_ours_crosses_into_the_manager(drive):
    """With everything behind the tier failing, requests are computed and each job ends once."""
    driver = drive()
    driver.await_state("on")
    keys = prompt("a", 6)
    driver.serve("r1", keys)
    driver.settle()
    real = driver.tier._binding
    driver.tier._binding = Broken()
    try:
        assert 6 == driver.serve("r2", keys), "the CPU tier is not ours and still hits"
        assert 0 == driver.serve("r3", prompt("b", 6))
        driver.tier.drain_jobs()
        driver.settle()
        assert not driver.manager._jobs
    finally:
        driver.tier._binding = real

    data = driver.tier._metrics.take().data["data"]
    assert "vllm:prefixstore_failed_callbacks" in data


def test_a_completion_that_cannot_be_taken_costs_no_other(drive):
    """An answer to a question that nobody asked is swallowed; the jobs beside it still end."""
    driver = drive()
    driver.await_state("on")
    driver.tier._binding.client.find(10**9, [], chained=True)

    assert 0 == driver.serve("r1", prompt("a", 5))
    driver.settle()

    assert not driver.manager._jobs
    failed = driver.tier.get_stats().data["data"]["vllm:prefixstore_failed_callbacks"]
    assert {("_take",): 1} == failed


def test_every_job_is_reported_exactly_once(drive):
    """Unknown tickets and second reports assert in vLLM's manager; none may come from us."""
    driver = drive()
    driver.await_state("on")
    reported: list[int] = []
    original = driver.tier.get_finished_jobs

    def record():
        results = list(original())
        reported.extend(result.job_id for result in results)
        return results

    driver.tier.get_finished_jobs = record
    for i in range(6):
        driver.serve(f"r{i}", prompt(f"p{i}", 5))
        if i == 3:
            os.kill(driver.tier._binding.client._pump._process.pid, signal.SIGKILL)
    driver.settle()

    assert sorted(set(reported)) == sorted(reported)
    assert not driver.manager._jobs


def test_a_bypassed_request_neither_loads_nor_stores(drive, tmp_path):
    """A request whose KV depends on more than the namespace leaves no trace in the root."""
    driver = drive()
    driver.await_state("on")
    keys = prompt("a", 4)
    driver.serve("r1", keys)
    driver.settle()
    other = drive()
    other.await_state("on")
    more = prompt("b", 6, after=keys)
    context = other.begin("adapter", more)
    other.tier.bypass("adapter")

    assert 0 == other.scan(context, more)
    other.load(context, ())
    other.compute(context, more)
    other.manager.on_request_finished(context)
    other.settle()

    assert 4 == len(list((tmp_path / "root").glob("ns/*/*/*/*.kv")))


def test_a_tier_that_was_turned_off_misses_and_ends_its_jobs(drive):
    """After a reset of weights nothing is loaded or stored, and nothing hangs."""
    driver = drive()
    driver.await_state("on")
    keys = prompt("a", 4)
    driver.serve("r1", keys)
    driver.settle()
    driver.tier.turn_off("for a test")
    driver.reset()

    assert 0 == driver.serve("r2", keys)
    driver.settle()


def test_a_reset_drains_and_the_store_is_kept(drive):
    """A reset by vLLM drops the CPU tier only; chunks are loaded again from the root."""
    driver = drive()
    driver.await_state("on")
    keys = prompt("a", 4)
    driver.serve("r1", keys)

    driver.reset()

    assert 4 == driver.serve("r2", keys)


def test_a_reset_waits_for_no_proof_that_hangs(drive):
    """Where the files of an adapter hang, vLLM's jobs end unproved, as it asserts that they do."""
    driver = drive(drain_s=0.2)
    driver.await_state("on")
    adapters = Adapters(capacity=1, settings={}, digests=WeightDigests(None))
    hangs = threading.Event()
    adapters._try_proof = lambda _use: hangs.wait(PATIENCE_S)
    driver.tier.serve_adapters(adapters)
    use = AdapterUse(Adapter("a", has_3d_weights=False, files=object()), 1, Stay())
    keys = prompt("a", 3)
    context = driver.begin("r", keys)
    driver.tier.adapt("r", use)
    driver.compute(context, keys)
    driver.end_step()
    assert driver.manager.has_pending_work()

    driver.reset()
    driver.settle()

    skipped = driver.tier.get_stats().data["data"]["vllm:prefixstore_stores_skipped"]
    assert {("adapter",): 3} == skipped
    hangs.set()


def test_the_region_has_no_name_once_everyone_has_mapped_it(drive):
    """A SIGKILL cannot leak the CPU tier in /dev/shm."""
    driver = drive()

    assert not Path(driver.spec._scheduler_mmap.mmap_path).exists()


def test_without_a_namespace_the_bare_tier_refuses(tmp_path):
    """Under vLLM's own spec a tier cannot know the model: it says what to set."""
    config = make_config(tmp_path / "root", slots=4, engine=f"refused-{os.getpid()}")
    del config.extra_config["secondary_tiers"][0]["namespace"]
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    with pytest.raises(InvalidError, match="namespace"):
        TieringOffloadingSpec(config).get_manager()


def test_a_cpu_tier_without_room_for_a_chunk_is_refused(tmp_path):
    """What would fail deep in vLLM is said in one sentence, with what to set."""
    config = make_config(tmp_path / "root", slots=0, engine=f"empty-{os.getpid()}")
    config.extra_config["cpu_bytes_to_use"] = CHUNK_BYTES - 1

    with pytest.raises(InvalidError, match="holds no chunk"):
        PrefixStoreSpec(config)


def test_a_job_for_an_unknown_request_is_answered(drive):
    """A store that vLLM submits for a request that is gone ends, and says that it did not store."""
    driver = drive()
    driver.await_state("on")

    driver.tier.submit_store(
        TransferJob(
            job_id=77,
            keys=prompt("x", 2),
            chunk_ids=np.array([0, 1], dtype=np.int32),
            is_promotion=False,
            req_context=ReqContext(req_id="gone"),
        )
    )

    (result,) = list(driver.tier.get_finished_jobs())
    assert isinstance(result, JobResult)
    assert 77 == result.job_id
