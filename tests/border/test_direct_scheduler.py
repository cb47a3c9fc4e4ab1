"""The books of the direct path: what is asked, loaded, stored and held, without an engine."""

from types import SimpleNamespace
from typing import Any

from prefixstore.keys import Key
from prefixstore.testing.clock import ManualClock
from prefixstore.vllm.direct.messages import RankReport, StepOrders, StepReport
from prefixstore.vllm.direct.scheduler import ChunkShape, DirectScheduler

BLOCKS = list(range(100, 140))
PATIENCE_S = 7.0


def request(name: str = "r", *, tokens: int = 70, **fields: Any) -> Any:
    """Make a request of ``tokens`` tokens with hashes of 8 tokens."""
    return SimpleNamespace(
        request_id=name,
        lora_request=None,
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        block_hashes=[bytes([n]) * 32 for n in range(tokens // 8)],
        skip_reading_prefix_cache=False,
        **fields,
    )


def key(number: int) -> Key:
    return Key(bytes([number]) * 32 + bytes(4))


class Harness:
    """A scheduler's side with two ranks, chunks of two blocks of 8 tokens, and a clock."""

    def __init__(self, *, ranks: int = 2, prompts_only: bool = False) -> None:
        self.clock = ManualClock()
        self.books = DirectScheduler(
            shape=ChunkShape(tokens_per_hash=8, tokens_per_block=8, blocks=2),
            ranks=ranks,
            find_patience_s=PATIENCE_S,
            clock=self.clock,
            prompts_only=prompts_only,
        )

    def step(self, scheduled: dict[str, int] | None = None, *, preempted: Any = ()) -> StepOrders:
        orders = self.books.take_loads(preempted=preempted)
        self.books.plan(
            orders,
            scheduled_tokens=scheduled or {},
            blocks_of=lambda _: BLOCKS,
        )
        return orders

    def found(self, orders: StepOrders, *counts: int) -> None:
        (find,) = orders.finds
        for rank, count in enumerate(counts):
            report = StepReport(ranks={rank: RankReport(found={find.ticket: count})})
            self.books.take_report(report)

    def settle(self, numbers: Any, *ranks: int) -> None:
        report = StepReport()
        for rank in ranks:
            report = report.join(StepReport(ranks={rank: RankReport(settled=list(numbers))}))
        self.books.take_report(report)


def test_a_hit_needs_every_rank():
    """What one rank lacks is no hit, and while one has not spoken there is no answer."""
    it, r = Harness(), request()
    it.books.add(r)

    assert it.books.count_matched(r, 0) is None
    orders = it.step()
    assert [tuple(key(n) for n in (1, 3, 5, 7))] == [find.keys for find in orders.finds]
    (find,) = orders.finds
    it.books.take_report(StepReport(ranks={1: RankReport(found={find.ticket: 4})}))
    assert it.books.count_matched(r, 0) is None
    it.books.take_report(StepReport(ranks={0: RankReport(found={find.ticket: 3})}))
    assert 48 == it.books.count_matched(r, 0)
    assert 8 == it.books.count_matched(r, 40)
    assert [] == it.step().finds, "asked once"


def test_one_token_is_left_to_compute():
    """A prompt of whole chunks is not loaded whole: the engine needs a token to compute."""
    it, r = Harness(ranks=1), request(tokens=64)
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 4)

    assert 48 == it.books.count_matched(r, 0)


def test_workers_that_say_nothing_cost_a_bounded_wait():
    """After its patience a request is computed; an answer after that is of no use any more."""
    it, r = Harness(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    orders = it.step()
    it.clock.advance(PATIENCE_S + 0.1)

    assert 0 == it.books.count_matched(r, 0)
    it.found(orders, 4, 4)
    assert 0 == it.books.count_matched(r, 0)


def test_a_load_writes_only_past_the_engines_own_blocks():
    """The chunk that the engine holds half of is loaded into its second block only."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 8)
    it.found(it.step(), 3)
    assert 40 == it.books.count_matched(r, 8)
    it.books.allocate(r, BLOCKS, 40)
    (load,) = it.step().loads

    assert [(key(1), (101,), 1), (key(3), (102, 103), 0), (key(5), (104, 105), 0)] == [
        (chunk.key, chunk.blocks, chunk.first) for chunk in load.chunks
    ]


def test_what_was_found_is_not_stored_again_but_what_failed_is():
    """Stores begin after the match; a chunk that a load did not bring is stored once it is computed."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 3)
    it.books.count_matched(r, 0)
    it.books.allocate(r, BLOCKS, 48)
    it.step()
    it.books.take_failures([103])
    it.books.end_loads(["r"])
    assert 0 == it.books.count_matched(r, 0), "not from the store twice"
    r.num_computed_tokens = 24
    stores = it.step({"r": 46}).stores

    assert [(key(3), key(1), 32, (102, 103)), (key(5), key(3), 48, (104, 105))] == [
        (store.key, store.parent, store.end_token, store.blocks) for store in stores[:2]
    ]
    assert [key(3), key(5), key(7)] == [store.key for store in stores]


def test_blocks_are_held_until_every_rank_has_read_them():
    """A request that ends while a rank still reads keeps its blocks; one that is all read does not."""
    it, early, late = Harness(), request("early"), request("late")
    for r in (early, late):
        it.books.add(r)
        it.books.count_matched(r, 0)
    orders = it.step()
    for find in orders.finds:
        for rank in (0, 1):
            it.books.take_report(StepReport(ranks={rank: RankReport(found={find.ticket: 0})}))
    stores = it.step({"early": 70, "late": 70}).stores
    numbers = {
        name: [s.number for s in stores if s.request_id == name] for name in ("early", "late")
    }
    assert [4, 4] == [len(part) for part in numbers.values()]
    it.settle(numbers["early"], 0, 1)
    it.settle(numbers["late"], 0)

    assert (False, True) == (it.books.finish(early), it.books.finish(late))
    assert ["late"] == it.step().held


def test_a_request_that_ends_while_it_loads_is_vllms_to_hold():
    """VLLM keeps those blocks until the load is reported; a second promise would free them twice."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 4)
    it.books.count_matched(r, 0)
    it.books.allocate(r, BLOCKS, 64)

    assert not it.books.finish(r)


def test_a_preempted_request_is_asked_about_anew():
    """Its stores are forgotten, and what it stored before may serve it when it is resumed."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0)
    it.books.count_matched(r, 0)
    stores = it.step({"r": 70}).stores
    orders = it.step(preempted=["r"])
    it.settle([store.number for store in stores], 0)

    assert ["r"] == orders.preempted
    assert it.books.count_matched(r, 0) is None
    it.found(it.step(), 4)
    assert 64 == it.books.count_matched(r, 0)
    assert not it.books.finish(r)


def test_adapters_and_a_reset_store_are_left_alone():
    """A request with an adapter, and every request after a reset, neither loads nor stores."""
    it, r, adapted = Harness(ranks=1), request(), request("a")
    adapted.lora_request = object()
    it.books.add(r)
    it.books.add(adapted)
    assert 0 == it.books.count_matched(adapted, 0)
    it.books.count_matched(r, 0)
    it.books.turn_off()
    orders = it.step({"r": 70, "a": 70})

    assert 0 == it.books.count_matched(r, 0)
    assert ([], [], True) == (orders.finds, orders.stores, orders.is_off)


def test_prompts_only_stores_no_generated_chunk():
    """With vLLM's offload_prompt_only the chunk that generation completes is not stored."""
    it = Harness(ranks=1, prompts_only=True)
    r = request(tokens=70)
    r.num_prompt_tokens = 40
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0)

    assert [16, 32] == [store.end_token for store in it.step({"r": 70}).stores]


def test_a_hot_prompt_waits_for_no_lookup():
    """What the engine holds itself starts at once; the answer only says what need not be stored."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)

    assert 0 == it.books.count_matched(r, 64)
    r.num_computed_tokens = 64
    orders = it.step({"r": 6})
    assert [] == orders.stores, "nobody knows yet what is stored"
    it.found(orders, 3)
    r.num_computed_tokens = 70
    assert [64] == [store.end_token for store in it.step({"r": 1}).stores]


def test_a_token_that_was_taken_back_names_no_chunk():
    """A session that replaces its last token stores the chunk under the new hash, never the old."""
    it, r = Harness(ranks=1), request(tokens=64)
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0)
    r.num_computed_tokens = 0
    it.step({"r": 63})
    r.block_hashes[7] = bytes([99]) * 32
    r.num_computed_tokens = 63

    assert [key(99)] == [store.key for store in it.step({"r": 1}).stores]


def test_a_load_that_cannot_be_ordered_is_reported_once():
    """Its own blocks come back as failed, those of the engine's cache do not, and it is not retried."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 16)
    it.found(it.step(), 4)
    assert 48 == it.books.count_matched(r, 16)
    it.books.doom("r", BLOCKS[:8], 48)
    (order,) = it.step().loads

    assert ((), (102, 103, 104, 105, 106, 107)) == (order.chunks, order.doomed)
    assert 0 == it.books.count_matched(r, 16)
