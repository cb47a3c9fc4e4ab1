"""The books of the direct path: what is asked, loaded, stored and held, without an engine."""

from types import SimpleNamespace
from typing import Any

from prefixstore.keys import Key
from prefixstore.testing.clock import ManualClock
from prefixstore.vllm.direct.chunks import ChunkShape
from prefixstore.vllm.direct.messages import RankReport, StepOrders, StepReport
from prefixstore.vllm.direct.scheduler import DirectScheduler
from prefixstore.vllm.direct.worth import MatchWorth
from prefixstore.vllm.worth import OBSERVATIONS_NEEDED

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
        num_in_flight_tokens=0,
        block_hashes=[bytes([n]) * 32 for n in range(tokens // 8)],
        skip_reading_prefix_cache=False,
        kv_transfer_params=None,
        **fields,
    )


def key(number: int) -> Key:
    return Key(bytes([number]) * 32 + bytes(4))


def flags(count: int) -> tuple[bytes, ...]:
    """Say that the first ``count`` of four chunks are there."""
    return (bytes([1] * count + [0] * (4 - count)),)


class Harness:
    """A scheduler's side with two ranks, chunks of two blocks of 8 tokens, and a clock."""

    def __init__(self, *, ranks: int = 2, prompts_only: bool = False) -> None:
        self.clock = ManualClock()
        self.books = DirectScheduler(
            shapes=[ChunkShape(tokens_per_hash=8, tokens_per_block=8, blocks=2)],
            ranks=ranks,
            find_patience_s=PATIENCE_S,
            clock=self.clock,
            prompts_only=prompts_only,
        )

    def step(self, scheduled: dict[str, int] | None = None, *, preempted: Any = ()) -> StepOrders:
        orders = self.books.take_loads()
        self.books.plan(
            orders,
            scheduled_tokens=scheduled or {},
            preempted=preempted,
            blocks_of=lambda _: (BLOCKS,),
        )
        return orders

    def found(self, orders: StepOrders, *counts: int) -> None:
        (find,) = orders.finds
        for rank, count in enumerate(counts):
            report = StepReport(ranks={rank: RankReport(found={find.ticket: flags(count)})})
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
    (find,) = orders.finds
    assert [tuple(key(n) for n in (1, 3, 5, 7))] == [group.keys for group in find.groups]
    it.books.take_report(StepReport(ranks={1: RankReport(found={find.ticket: flags(4)})}))
    assert it.books.count_matched(r, 0) is None
    it.books.take_report(StepReport(ranks={0: RankReport(found={find.ticket: flags(3)})}))
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
    it.books.allocate(r, [BLOCKS], 40)
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
    it.books.allocate(r, [BLOCKS], 48)
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


def test_a_step_tells_which_stores_its_blocks_end():
    """Blocks are nobody's to keep: one that is given away ends the stores that a rank still reads."""
    it, r = Harness(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0, 0)
    stores = it.step({"r": 70}).stores
    numbers = [store.number for store in stores]
    it.books.finish(r, [BLOCKS])
    it.settle(numbers[:1], 0, 1)
    it.settle(numbers[1:2], 0)
    assert it.books.is_reading
    it.books.give_away([*stores[0].blocks, stores[1].blocks[1], 500])

    assert [numbers[1]] == it.step().overwritten
    assert [] == it.step().overwritten, "once"
    it.settle(numbers[2:], 0, 1)
    assert not it.books.is_reading


def test_the_blocks_of_a_load_are_given_away_too():
    """What a load writes into may still be read for a request that has ended."""
    it, ended, r = Harness(ranks=1), request("ended"), request("r")
    it.books.add(ended)
    it.books.count_matched(ended, 0)
    it.found(it.step(), 0)
    stores = it.step({"ended": 70}).stores
    it.books.finish(ended, [BLOCKS])
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 2)
    it.books.count_matched(r, 0)
    it.books.allocate(r, [BLOCKS], 32)

    assert [store.number for store in stores[:2]] == it.step().overwritten


def test_an_engine_steps_on_for_stores_only_while_they_move():
    """A store that no rank ends keeps an idle engine busy for a bounded time."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0)
    stores = it.step({"r": 70}).stores
    it.books.finish(r, [BLOCKS])
    it.clock.advance(4.0)
    it.settle([stores[0].number], 0)
    it.clock.advance(4.0)
    assert it.books.is_reading
    it.clock.advance(2.0)
    assert not it.books.is_reading


def test_a_rank_without_a_store_turns_all_off():
    """What one rank cannot store is of no use from the others."""
    it, r = Harness(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.books.take_report(StepReport(ranks={1: RankReport(is_off=True)}))

    assert it.step().is_off
    assert 0 == it.books.count_matched(r, 0)


def test_a_preempted_request_is_asked_about_anew():
    """Its stores are forgotten, and what it stored before may serve it when it is resumed."""
    it, r = Harness(ranks=1), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 0)
    it.books.count_matched(r, 0)
    stores = it.step({"r": 70}).stores
    it.step(preempted=["r"])
    it.settle([store.number for store in stores], 0)

    assert it.books.count_matched(r, 0) is None
    it.found(it.step(), 4)
    assert 64 == it.books.count_matched(r, 0)


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


def test_a_request_that_reads_no_cache_waits_for_no_lookup():
    """It computes all of its prompt; the answer says what need not be stored."""
    it, r = Harness(ranks=1), request()
    r.skip_reading_prefix_cache = True
    it.books.add(r)

    assert 0 == it.books.count_matched(r, 0)
    it.found(it.step(), 3)
    assert [64] == [store.end_token for store in it.step({"r": 70}).stores]


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
    it.books.doom("r", [BLOCKS[:8]], 48)
    (order,) = it.step().loads

    assert ((), (102, 103, 104, 105, 106, 107)) == (order.chunks, order.doomed)
    assert 0 == it.books.count_matched(r, 16)


def test_a_request_may_limit_what_it_loads_and_stores():
    """By vLLM's own `kv_transfer_params`, in whole chunks; what is no limit is none."""
    it = Harness(ranks=1)
    limited, odd = request("limited"), request("odd")
    limited.kv_transfer_params = {"max_load_tokens": 40, "max_offload_tokens": 60}
    odd.kv_transfer_params = {"max_load_tokens": -1, "max_offload_tokens": True}
    for r in (limited, odd):
        it.books.add(r)
        assert it.books.count_matched(r, 0) is None
        it.found(it.step(), 3)

    assert [32, 48] == [it.books.count_matched(r, 0) for r in (limited, odd)]
    stores = it.step({"limited": 70, "odd": 70}).stores
    assert [("odd", 64)] == [(store.request_id, store.end_token) for store in stores]


class Windowed(Harness):
    """One group of full attention beside one with a window of 20 tokens; windows are kept every 32."""

    BLOCKS = (list(range(100, 140)), list(range(200, 240)))

    def __init__(self) -> None:
        super().__init__(ranks=1)
        shapes = [
            ChunkShape(tokens_per_hash=8, tokens_per_block=8, blocks=1, group=n, window=window)
            for n, window in enumerate((None, 20))
        ]
        self.books = DirectScheduler(
            shapes=shapes, ranks=1, find_patience_s=PATIENCE_S, clock=self.clock, interval=32
        )
        self.blocks = tuple(list(blocks) for blocks in self.BLOCKS)

    def step(self, scheduled: dict[str, int] | None = None, *, preempted: Any = ()) -> StepOrders:
        orders = self.books.take_loads()
        self.books.plan(
            orders,
            scheduled_tokens=scheduled or {},
            preempted=preempted,
            blocks_of=lambda _: self.blocks,
        )
        return orders

    def answer(self, orders: StepOrders, full: bytes, window: bytes) -> None:
        (find,) = orders.finds
        report = RankReport(found={find.ticket: (full, window)})
        self.books.take_report(StepReport(ranks={0: report}))


def by_group(stores: Any) -> list[list[Any]]:
    """Part stores by what their keys end with."""
    return [[store for store in stores if store.key[-1] == group] for group in (0, 1)]


def test_windows_are_stored_at_boundaries_and_where_the_prompt_ends():
    """Of 70 tokens those before 32 and 64, which is also the end; what has left the window is not."""
    it, r = Windowed(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.answer(it.step(), bytes(8), bytes(8))
    it.blocks[1][:2] = [0, 0]
    stores = it.step({"r": 70}).stores
    full, windows = by_group(stores)

    assert [8, 16, 24, 32, 40, 48, 56, 64] == [store.end_token for store in full]
    assert [(24, (202,)), (32, (203,)), (48, (205,)), (56, (206,)), (64, (207,))] == [
        (store.end_token, store.blocks) for store in windows
    ]
    assert sorted(stores, key=lambda store: store.end_token) == stores


def test_a_hit_ends_where_every_group_has_what_it_needs():
    """All of full attention and the window before 32 are there: 32 tokens are loaded, and no more."""
    it, r = Windowed(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.answer(it.step(), bytes([1] * 8), bytes([0, 1, 1, 1, 1, 0, 1, 1]))
    assert 40 == it.books.count_matched(r, 0)
    blocks = [it.BLOCKS[0][:5], [0, 0, *it.BLOCKS[1][2:5]]]
    it.books.allocate(r, blocks, 40)
    (load,) = it.step().loads

    assert load.is_whole
    assert [(n, 0) for n in range(5)] == [
        (chunk.blocks[0] - 100, chunk.first) for chunk in load.chunks if chunk.key[-1] == 0
    ]
    assert [202, 203, 204] == [chunk.blocks[0] for chunk in load.chunks if chunk.key[-1] == 1]


def test_of_a_load_that_failed_nothing_is_used_and_all_is_offered_again():
    """Groups cannot be cut short one by one: the request computes, and stores what it computed."""
    it, r = Windowed(), request(tokens=41)
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.answer(it.step(), bytes([1] * 5), bytes([0, 0, 1, 1, 1]))
    assert 40 == it.books.count_matched(r, 0)
    it.books.allocate(r, [it.BLOCKS[0][:5], [0, 0, *it.BLOCKS[1][2:5]]], 40)
    it.step()
    it.books.take_failures([], ["r"])
    it.books.end_loads(["r"])

    assert 0 == it.books.count_matched(r, 0), "not from the store twice"
    stores = it.step({"r": 41}).stores
    assert [[8, 16, 24, 32, 40], [16, 24, 32, 40]] == [
        [store.end_token for store in group] for group in by_group(stores)
    ]


class Slow(Harness):
    """One rank whose loads bring 1 kB/s, below an engine that computes 1,000 tokens/s; chunks of 1 kB."""

    def __init__(self, *, is_slow: bool = True) -> None:
        super().__init__(ranks=1)
        self.declined: list[int] = []
        worth = MatchWorth([1000], clock=self.clock, declined=self.declined.append)
        self.books = DirectScheduler(
            shapes=[ChunkShape(tokens_per_hash=8, tokens_per_block=8, blocks=2)],
            ranks=1,
            find_patience_s=PATIENCE_S,
            clock=self.clock,
            worth=worth,
        )
        for _ in range(OBSERVATIONS_NEEDED):
            self.step({"other": 100})
            self.clock.advance(0.1)
            loads = [(1000.0, 1.0 if is_slow else 0.001, 1)]
            report = RankReport(ends_step=True, loads=loads)
            self.books.take_report(StepReport(ranks={0: report}))


def test_a_match_that_would_lose_is_declined_once_and_stores_nothing_again():
    """Loads at 16 tokens/s lose to 1,000: the request computes, whatever is asked again."""
    it, r = Slow(), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 3)

    assert [0, 0] == [it.books.count_matched(r, 0) for _ in range(2)]
    assert [3] == it.declined
    assert [64] == [store.end_token for store in it.step({"r": 70}).stores]


def test_a_match_that_pays_is_loaded():
    """Loads at 16,000 tokens/s win."""
    it, r = Slow(is_slow=False), request()
    it.books.add(r)
    it.books.count_matched(r, 0)
    it.found(it.step(), 3)

    assert 48 == it.books.count_matched(r, 0)
    assert [] == it.declined
