"""When a stored match is loaded and when it is computed instead: decided from measured rates alone."""

import pytest

from prefixstore.vllm.worth import (
    OBSERVATIONS_NEEDED,
    PROBE_INTERVAL_S,
    LoadMeter,
    LoadWorth,
    PrefillMeter,
    Rate,
)

MATCH = {"load_bytes": 1000, "tokens": 100}


def judged(
    *, load_s: float, prefill_s: float, observations: int = OBSERVATIONS_NEEDED
) -> LoadWorth:
    """Give a judge that saw loads of MATCH's bytes and prefills of its tokens take so long."""
    worth = LoadWorth(prefill=Rate())
    for _ in range(observations):
        worth.loads.note(1000, load_s)
        worth.prefill.note(100, prefill_s)
    return worth


@pytest.mark.parametrize(("load_s", "pays"), [(0.1, True), (1.0, True), (1.9, True), (2.1, False)])
def test_a_match_is_declined_only_where_loading_clearly_loses(load_s: float, *, pays: bool) -> None:
    """A load may take up to twice as long as the prefill that it saves the device."""
    assert pays is judged(load_s=load_s, prefill_s=1.0).pays(**MATCH, now_s=0.0)


def test_without_evidence_every_match_is_loaded() -> None:
    """The slowest loads decline nothing before enough of them, and of prefills, were seen."""
    few = judged(load_s=1000.0, prefill_s=1.0, observations=OBSERVATIONS_NEEDED - 1)
    no_prefill = LoadWorth(prefill=Rate())
    for _ in range(100):
        no_prefill.loads.note(1000, 1000.0)

    assert few.pays(**MATCH, now_s=0.0)
    assert no_prefill.pays(**MATCH, now_s=0.0)


def test_loads_that_bring_nothing_are_no_rate() -> None:
    """Misses take time and bring no bytes: how fast a load is stays unknown."""
    worth = judged(load_s=1.0, prefill_s=1.0, observations=0)
    for _ in range(OBSERVATIONS_NEEDED):
        worth.loads.note(0, 10.0)
        worth.prefill.note(100, 1.0)

    assert worth.pays(**MATCH, now_s=0.0)


def test_loads_that_run_together_share_the_time() -> None:
    """Each of sixteen waits for the others; the link brings what all of them brought in that time."""
    meter = LoadMeter(Rate())
    for load in range(16):
        meter.begin(load, now_s=0.0)
    for load in range(16):
        meter.end(load, landed_bytes=1000, elapsed_s=7.0 + load / 15)

    assert pytest.approx(2000) == meter.rate.per_s
    assert 16 == meter.rate.observations


def test_loads_that_overlap_without_end_are_measured_as_they_come() -> None:
    """A busy engine always has a load under way: 1,000 bytes land every 5 s, each load takes 10 s."""
    meter = LoadMeter(Rate())
    for load in range(100):
        if load >= 2:
            meter.end(load - 2, landed_bytes=1000, elapsed_s=10.0)
        meter.begin(load, now_s=5.0 * load)

    assert 90 < meter.rate.observations <= 98
    assert pytest.approx(200, rel=0.1) == meter.rate.per_s


def test_a_load_is_measured_to_its_end_and_not_to_when_one_hears_of_it() -> None:
    """Between loads the link rests, even where the first is told of once the second has begun."""
    meter = LoadMeter(Rate())
    for load in range(0, 20, 2):
        meter.begin(load, now_s=10.0 * load)
        meter.begin(load + 1, now_s=10.0 * load + 5)
        meter.end(load, landed_bytes=1000, elapsed_s=1.0)
        meter.end(load + 1, landed_bytes=1000, elapsed_s=1.0)

    assert pytest.approx(1000) == meter.rate.per_s


def test_between_the_two_bounds_the_last_decision_stays() -> None:
    """A ratio that wavers around one bound does not make hits come and go."""
    worth = judged(load_s=1.5, prefill_s=1.0)
    assert worth.pays(**MATCH, now_s=0.0)
    for _ in range(100):
        worth.loads.note(1000, 3.0)
    assert not worth.pays(**MATCH, now_s=0.0)
    for _ in range(100):
        worth.loads.note(1000, 1.5)
    assert not worth.pays(**MATCH, now_s=0.0)
    for _ in range(100):
        worth.loads.note(1000, 0.9)
    assert worth.pays(**MATCH, now_s=0.0)


def test_declined_matches_are_probed_and_come_back() -> None:
    """One match in an interval is loaded all the same, and fast loads end the declining."""
    worth = judged(load_s=10.0, prefill_s=1.0)
    answers = [worth.pays(**MATCH, now_s=float(second)) for second in range(31)]

    assert 31 // int(PROBE_INTERVAL_S) == sum(answers)
    for _ in range(100):
        worth.loads.note(1000, 0.1)
    assert worth.pays(**MATCH, now_s=31.0)


def test_only_a_change_of_what_is_decided_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An operator reads once that hits are declined, on which figures, and once that they are back."""
    worth = judged(load_s=10.0, prefill_s=1.0)
    for _ in range(5):
        worth.pays(**MATCH, now_s=0.0)
    for _ in range(100):
        worth.loads.note(1000, 0.1)
    for _ in range(5):
        worth.pays(**MATCH, now_s=1.0)

    declined, back = caplog.messages
    assert "matches are declined: loading 100 tokens would take 10.0 times as long" in declined
    assert "matches are loaded again" in back


def test_steps_that_overlap_are_measured_one_after_the_other() -> None:
    """A step scheduled while another runs begins when that one ends."""
    meter = PrefillMeter()
    meter.begin_step(1000, now_s=0.0)
    meter.begin_step(1000, now_s=0.1)
    meter.end_step(now_s=1.0)
    meter.begin_step(1, now_s=1.0)
    meter.end_step(now_s=2.0)

    assert (2, 1900.0, 1.9) == (meter.rate.observations, meter.rate.amount, meter.rate.seconds)


def test_steps_that_only_decode_are_no_prefill() -> None:
    """A few tokens a step say nothing of how fast a prompt is computed."""
    meter = PrefillMeter()
    for second in range(20):
        meter.begin_step(8, now_s=second)
        meter.end_step(now_s=second + 1)

    assert 0 == meter.rate.observations
