"""The books of the direct path at the end of a request and of an engine: what is stored that no step carries."""

from typing import Any

import pytest

from prefixstore.vllm.direct.messages import RankReport, StepReport
from tests.border.test_direct_scheduler import (
    BLOCKS,
    PATIENCE_S,
    Harness,
    Windowed,
    flags,
    key,
    request,
)


def compute(it: Harness, r: Any, tokens: int) -> Any:
    """Let a request compute its prompt before its find is answered; return the orders that asked."""
    it.books.add(r)
    r.skip_reading_prefix_cache = True
    assert 0 == it.books.count_matched(r, 0)
    orders = it.step({r.request_id: tokens})
    assert [] == orders.stores
    r.num_computed_tokens = tokens
    return orders


def ends(stores: Any) -> list[int]:
    """Return where the chunks of stores end."""
    return [store.end_token for store in stores]


def test_a_request_that_ends_before_its_answer_stores_what_the_store_lacks():
    """Its blocks hold what it computed until they are given away; what is there already is not copied."""
    it, r = Harness(ranks=1), request()
    asked = compute(it, r, 70)
    it.books.finish(r, [BLOCKS])
    assert it.books.is_reading, "an idle engine goes on for the answer"
    assert [] == it.step().late_stores
    it.found(asked, 2)
    orders = it.step()

    assert [
        (key(5), key(3), 48, (104, 105)),
        (key(7), key(5), 64, (106, 107)),
    ] == [(store.key, store.parent, store.end_token, store.blocks) for store in orders.late_stores]
    it.settle([store.number for store in orders.late_stores], 0)
    assert not it.books.is_reading
    assert [] == it.step().late_stores, "once"


def test_of_an_aborted_request_only_what_has_come_through_is_stored():
    """Tokens of steps under way may not be there; of one that was preempted nothing is."""
    it = Harness(ranks=1)
    aborted, preempted = request("aborted"), request("preempted")
    for r in (preempted, aborted):
        asked = compute(it, r, 70)
        if r is preempted:
            it.step(preempted=["preempted"])
            r.num_computed_tokens = 0
        r.num_in_flight_tokens = 30
        it.books.finish(r, [BLOCKS] if r is aborted else [[]])
        it.found(asked, 0)

    assert [("aborted", 16), ("aborted", 32)] == [
        (store.request_id, store.end_token) for store in it.step().late_stores
    ]


def test_blocks_that_are_given_away_before_the_answer_are_not_read():
    """Nor those that the very step gives away that orders the rest."""
    it, r = Harness(ranks=1), request()
    asked = compute(it, r, 70)
    it.books.finish(r, [BLOCKS])
    it.books.give_away([100])
    it.step()
    it.found(asked, 0)
    it.books.give_away([103])
    orders = it.step()

    assert [32, 48, 64] == ends(orders.late_stores)
    assert [orders.late_stores[0].number] == orders.overwritten


def test_an_answer_that_never_comes_costs_a_bounded_wait():
    """After its patience an ended request is taken for one of which nothing is stored."""
    it, r = Harness(), request()
    asked = compute(it, r, 70)
    it.books.finish(r, [BLOCKS])
    it.clock.advance(PATIENCE_S - 0.1)
    assert [] == it.step().late_stores
    it.clock.advance(0.2)
    assert [16, 32, 48, 64] == ends(it.step().late_stores)
    it.found(asked, 4, 4)

    assert [] == it.step().late_stores


def test_limits_and_windows_hold_for_what_is_stored_late():
    """What has left the window is not read, and no boundary means no store."""
    it, r = Windowed(), request()
    r.kv_transfer_params = {"max_offload_tokens": 50}
    asked = compute(it, r, 70)
    it.books.finish(r, [it.BLOCKS[0], [0, 0, 0, *it.BLOCKS[1][3:]]])
    it.answer(asked, bytes(8), bytes(8))
    late = it.step().late_stores

    assert [[8, 16, 24, 32, 40, 48], [32, 48]] == [
        ends(store for store in late if store.key[-1] == group) for group in (0, 1)
    ]


@pytest.mark.parametrize("when", ["before the end", "after the end"])
def test_after_a_reset_nothing_is_stored_late(when: str):
    """What ended before it was computed by the weights of before, into a cache that may be gone."""
    it, r = Harness(ranks=1), request()
    asked = compute(it, r, 70)
    if when == "before the end":
        it.books.turn_off()
    it.books.finish(r, [BLOCKS])
    it.books.turn_off()
    it.found(asked, 0)

    assert [] == it.step().late_stores
    assert not it.books.is_reading


def test_requests_with_embeddings_are_left_alone():
    """Whether they come with the request or with a later input of its session."""
    it = Harness(ranks=1)
    embedded, session = request("embedded", prompt_embeds=object()), request("session")
    for r in (embedded, session):
        it.books.add(r)
    assert it.books.count_matched(session, 0) is None
    it.books.leave_alone("session")
    it.found(it.step(), 3)

    assert [0, 0] == [it.books.count_matched(r, 0) for r in (embedded, session)]
    assert [] == it.step({"embedded": 70, "session": 70}).stores


def test_steps_are_numbered_and_proven_once_every_rank_has_ended_them():
    """The least of what the ranks have ended."""
    it = Harness(ranks=2)
    assert [(1, 0), (2, 0)] == [(orders.number, orders.proven) for orders in (it.step(), it.step())]
    for rank, ended in ((0, 2), (1, 1)):
        it.books.take_report(StepReport(ranks={rank: RankReport(ended=ended)}))

    assert (3, 1) == ((orders := it.step()).number, orders.proven)


def test_an_engine_that_ends_hands_over_what_no_step_carries():
    """To a worker that has ended every step, while the cache was not reset."""
    it, r = Harness(ranks=1), request()
    compute(it, r, 70)
    it.books.finish(r, [BLOCKS])

    assert it.books.take_last_stores(0) is None, "a step did not come through"
    assert [16, 32, 48, 64] == ends(it.books.take_last_stores(1) or ())
    it.books.turn_off()
    assert it.books.take_last_stores(1) is None


def test_reports_of_ranks_are_joined():
    """What each rank has ended stays its own."""
    joined = StepReport(ranks={0: RankReport(ended=3, settled=[1])}).join(
        StepReport(ranks={0: RankReport(found={7: flags(1)}), 1: RankReport(ended=2)})
    )

    assert [3, 2] == [joined.ranks[rank].ended for rank in (0, 1)]
    assert ([1], {7: flags(1)}) == (joined.ranks[0].settled, joined.ranks[0].found)
