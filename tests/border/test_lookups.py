"""What vLLM's scheduler is told about each key, driven the way its scans drive it."""

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.keys import Key
from prefixstore.vllm.lookups import Answer, Budget, Chains, RequestLookup, match

CHUNK = 16


def key(chunk: int, group: int = 0) -> Key:
    return Key(chunk.to_bytes(32, "big") + group.to_bytes(4, "big"))


def scan(lookup: RequestLookup, keys: list[Key], *, group: int = 0) -> list[Answer]:
    """Ask front to back, ending at the first miss, as vLLM does for full attention."""
    answers = []
    for k in keys:
        answers.append(lookup.ask(k, end_token(k)))
        if answers[-1] is Answer.MISS:
            break
    return answers


def end_token(k: Key) -> int:
    return (int.from_bytes(k[:32], "big") + 1) * CHUNK


def answer_all(lookup: RequestLookup, stored: set[Key]) -> None:
    for question in lookup.take_questions():
        lookup.take_verdict(question, [k in stored for k in question.keys])


def admit_all(lookup: RequestLookup) -> None:
    assert lookup.undecided
    lookup.decide(lookup.wanted())


def test_every_key_is_retried_until_the_whole_match_is_known():
    """No HIT, which would take a slot at once, is given before all verdicts are in."""
    lookup, keys = RequestLookup(), [key(i) for i in range(4)]

    assert scan(lookup, keys) == [Answer.RETRY] * 4
    questions = lookup.take_questions()
    assert scan(lookup, keys) == [Answer.RETRY] * 4
    for question in questions:
        lookup.take_verdict(question, [True] * len(question.keys))
    assert scan(lookup, keys) == [Answer.RETRY] * 4

    admit_all(lookup)

    assert scan(lookup, keys) == [Answer.HIT] * 4


def test_one_question_holds_a_group_in_the_order_of_the_prompt():
    """A group scanned from the back is asked about front to back, and is not called chained."""
    lookup = RequestLookup()
    for i in reversed(range(3)):
        lookup.ask(key(i, group=1), (i + 1) * CHUNK)

    (question,) = lookup.take_questions()

    assert tuple(key(i, group=1) for i in range(3)) == question.keys
    assert not question.chained


def test_only_the_run_from_the_front_hits():
    """What lies behind a gap cannot serve the request and takes no slot."""
    lookup, keys = RequestLookup(), [key(i) for i in range(5)]
    scan(lookup, keys)
    answer_all(lookup, {keys[0], keys[1], keys[3]})
    admit_all(lookup)

    assert scan(lookup, keys) == [Answer.HIT, Answer.HIT, Answer.MISS]


def test_a_key_hits_once_for_each_request():
    """A chunk that was promoted and evicted before use is recomputed, not promoted for ever."""
    lookup, keys = RequestLookup(), [key(i) for i in range(2)]
    scan(lookup, keys)
    answer_all(lookup, set(keys))
    admit_all(lookup)
    scan(lookup, keys)

    assert scan(lookup, keys) == [Answer.MISS]


def test_a_new_key_reopens_the_decision():
    """A scan that comes to further keys waits for their verdicts, too."""
    lookup = RequestLookup()
    scan(lookup, [key(0)])
    answer_all(lookup, {key(0), key(1)})
    admit_all(lookup)

    assert Answer.RETRY is lookup.ask(key(1), 2 * CHUNK)
    assert Answer.RETRY is lookup.ask(key(0), CHUNK)
    answer_all(lookup, {key(0), key(1)})
    admit_all(lookup)

    assert scan(lookup, [key(0), key(1)]) == [Answer.HIT, Answer.HIT]


def test_nothing_hits_when_a_window_group_has_nothing_in_the_match():
    """Full-attention chunks alone cannot serve a model that also needs a window."""
    full = {key(i): (i + 1) * CHUNK for i in range(4)}
    window = {key(i, 1): (i + 1) * CHUNK for i in reversed(range(8))}

    assert match([(full, set(full), True), (window, {key(7, 1)}, False)]) == []


def test_the_match_of_a_mixed_model_ends_with_its_last_usable_window():
    """Chunks of the other group behind the window's end are not promoted."""
    full = {key(i): (i + 1) * CHUNK for i in range(8)}
    window = {key(i, 1): (i + 1) * CHUNK for i in reversed(range(8))}

    found = match([(full, set(full), True), (window, {key(2, 1), key(3, 1)}, False)])

    assert {*(key(i) for i in range(4)), key(2, 1), key(3, 1)} == set(found)


def test_a_windowed_model_alone_hits_its_present_chunks():
    """Without a full-attention group every present chunk may be part of the window."""
    window = {key(i): (i + 1) * CHUNK for i in reversed(range(8))}

    assert [key(6), key(7)] == match([(window, {key(6), key(7)}, False)])


@given(st.sets(st.integers(0, 20)), st.integers(1, 20))
def test_a_match_is_always_a_gapless_run_of_present_chunks(stored, asked):
    """For full attention the match is exactly the longest run from the front."""
    ends = {key(i): (i + 1) * CHUNK for i in range(asked)}
    present = {key(i) for i in stored if i < asked}

    found = match([(ends, present, True)])

    run = next((i for i in range(asked) if key(i) not in present), asked)
    assert [key(i) for i in range(run)] == found


@given(
    st.lists(
        st.tuples(st.sampled_from(["reserve", "release"]), st.integers(0, 5), st.integers(1, 12)),
        max_size=40,
    )
)
def test_promises_never_exceed_the_slots_but_for_one_that_is_alone(steps):
    """Matches in flight fit the CPU tier together; one that does not fit alone goes alone."""
    budget, promised = Budget(8), {}
    for action, request, slots in steps:
        if action == "release":
            budget.release(str(request))
            promised.pop(request, None)
        elif budget.reserve(str(request), slots):
            promised[request] = promised.get(request, 0) + slots

        assert sum(promised.values()) <= 8 or len(promised) == 1


def test_parents_are_known_however_the_request_grows():
    """Keys learnt in parts have the same parents as keys learnt at once, each group its own."""
    named = [(key(i, group), (i + 1) * CHUNK) for group in range(2) for i in range(4)]
    later = [(key(i, group), (i + 1) * CHUNK) for group in range(2) for i in range(4, 6)]
    grown = Chains()
    grown.learn(named)
    grown.learn(later)

    assert (CHUNK, None) == grown.place(key(0))
    assert (5 * CHUNK, key(3, 1)) == grown.place(key(4, 1))
    assert 12 == len(grown)
    assert (0, None) == grown.place(key(9))


def test_a_boundary_inside_the_known_follows_the_nearest_key_before_it():
    """A state that is stored at a boundary of its own hangs on the last whole chunk before it."""
    chains = Chains()
    chains.learn([(key(0), CHUNK), (key(1), 2 * CHUNK), (key(77), CHUNK + 4)])

    assert (CHUNK + 4, key(0)) == chains.place(key(77))
    chains.learn([(key(2), 3 * CHUNK)])
    assert (3 * CHUNK, key(1)) == chains.place(key(2))
