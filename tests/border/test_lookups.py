"""What vLLM's scheduler is told about each key, driven the way its scans drive it."""

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.keys import Key
from prefixstore.vllm.lookups import (
    Answer,
    AskedGroup,
    Budget,
    Chains,
    Question,
    Reach,
    RequestLookup,
    match,
)

CHUNK = 16
FULL = Reach(chunk_tokens=CHUNK)
STATE = Reach(chunk_tokens=CHUNK, window_chunks=1)
WINDOW = Reach(chunk_tokens=CHUNK, window_chunks=4, window_tokens=4 * CHUNK - 1)
GUESSED = Reach(chunk_tokens=CHUNK, is_guessed=True)


def key(chunk: int, group: int = 0) -> Key:
    return Key(chunk.to_bytes(32, "big") + group.to_bytes(4, "big"))


def new_lookup(*reaches: Reach) -> RequestLookup:
    """Give a request's lookups in groups of these kinds; by default one group of full attention."""
    return RequestLookup(dict(enumerate(reaches or (FULL,))))


def asked(reach: Reach, ends: dict[Key, int], present: set[Key]) -> AskedGroup:
    """Give a group of which the store has said what it holds."""
    return AskedGroup(reach=reach, ends=ends, present=present)


def scan_back(lookup: RequestLookup, keys: list[Key], *, needed: int) -> int | None:
    """Ask back to front as vLLM's ``_sliding_window_lookup``; return how many keys the hit ends after."""
    run, is_deferred = 0, False
    for at in range(len(keys) - 1, -1, -1):
        answer = lookup.ask(keys[at], end_token(keys[at]))
        is_deferred |= answer is Answer.RETRY
        run = run + 1 if answer is Answer.HIT else 0
        if run == needed:
            return None if is_deferred else at + run
    return None if is_deferred else run


def scan(lookup: RequestLookup, keys: list[Key]) -> list[Answer]:
    """Ask front to back, ending at the first miss, as vLLM does for full attention."""
    answers = []
    for k in keys:
        answers.append(lookup.ask(k, end_token(k)))
        if answers[-1] is Answer.MISS:
            break
    return answers


def end_token(k: Key) -> int:
    return (int.from_bytes(k[:32], "big") + 1) * CHUNK


def answer_all(lookup: RequestLookup, stored: set[Key]) -> list[Question]:
    """Answer what the store is asked until it is asked no more; return what it was asked."""
    answered: list[Question] = []
    while questions := lookup.take_questions():
        for question in questions:
            lookup.take_verdict(question, [k in stored for k in question.keys])
        answered += questions
    return answered


def admit_all(lookup: RequestLookup) -> None:
    assert lookup.undecided
    lookup.decide(lookup.wanted())


def test_every_key_is_retried_until_the_whole_match_is_known():
    """No HIT, which would take a slot at once, is given before all verdicts are in."""
    lookup, keys = new_lookup(), [key(i) for i in range(4)]

    assert scan(lookup, keys) == [Answer.RETRY] * 4
    questions = lookup.take_questions()
    assert scan(lookup, keys) == [Answer.RETRY] * 4
    for question in questions:
        lookup.take_verdict(question, [True] * len(question.keys))
    assert scan(lookup, keys) == [Answer.RETRY] * 4

    admit_all(lookup)

    assert scan(lookup, keys) == [Answer.HIT] * 4


def test_windows_are_asked_about_last_and_from_the_end_of_what_the_others_have():
    """What lies behind the match of full attention cannot serve, and the nearest window serves best."""
    lookup = new_lookup(FULL, WINDOW)
    full, window = [key(i) for i in range(6)], [key(i, 1) for i in range(6)]
    scan(lookup, full)
    scan_back(lookup, window, needed=4)

    (first,) = lookup.take_questions()
    assert (tuple(full), True) == (first.keys, first.chained)
    assert not lookup.take_questions()
    lookup.take_verdict(first, [True, True, True, False, False, False])
    assert not lookup.undecided

    (second,) = lookup.take_questions()
    assert ((key(2, 1), key(1, 1), key(0, 1)), False) == (second.keys, second.chained)
    lookup.take_verdict(second, [True, True, True])
    admit_all(lookup)
    assert [Answer.HIT] * 3 == scan(lookup, full)[:3]
    assert 3 == scan_back(lookup, window[:3], needed=4)


def test_where_full_attention_has_nothing_no_window_is_asked_about():
    """A miss is decided as soon as the first verdicts are in, without another step of the engine."""
    lookup = new_lookup(FULL, STATE)
    scan(lookup, [key(i) for i in range(4)])
    scan_back(lookup, [key(i, 1) for i in range(4)], needed=1)
    (question,) = lookup.take_questions()

    lookup.take_verdict(question, [False] * 4)

    assert lookup.undecided
    assert not lookup.take_questions()
    assert not lookup.wanted()


def test_only_the_run_from_the_front_hits():
    """What lies behind a gap cannot serve the request and takes no slot."""
    lookup, keys = new_lookup(), [key(i) for i in range(5)]
    scan(lookup, keys)
    answer_all(lookup, {keys[0], keys[1], keys[3]})
    admit_all(lookup)

    assert scan(lookup, keys) == [Answer.HIT, Answer.HIT, Answer.MISS]


def test_a_key_hits_once_for_each_request():
    """A chunk that was promoted and evicted before use is recomputed, not promoted for ever."""
    lookup, keys = new_lookup(), [key(i) for i in range(2)]
    scan(lookup, keys)
    answer_all(lookup, set(keys))
    admit_all(lookup)
    scan(lookup, keys)

    assert scan(lookup, keys) == [Answer.MISS]


def test_a_new_key_reopens_the_decision():
    """A scan that comes to further keys waits for their verdicts, too."""
    lookup = new_lookup()
    scan(lookup, [key(0)])
    answer_all(lookup, {key(0), key(1)})
    admit_all(lookup)

    assert Answer.RETRY is lookup.ask(key(1), 2 * CHUNK)
    assert Answer.RETRY is lookup.ask(key(0), CHUNK)
    answer_all(lookup, {key(0), key(1)})
    admit_all(lookup)

    assert scan(lookup, [key(0), key(1)]) == [Answer.HIT, Answer.HIT]


def chunks(count: int, group: int = 0) -> dict[Key, int]:
    return {key(i, group): (i + 1) * CHUNK for i in range(count)}


def backwards(count: int, group: int = 0) -> dict[Key, int]:
    return dict(reversed(chunks(count, group).items()))


def held(*numbers: int, group: int = 1) -> set[Key]:
    return {key(i, group) for i in numbers}


def test_nothing_hits_when_a_window_group_has_nothing_in_the_match():
    """Full-attention chunks alone cannot serve a model that also needs a window."""
    full = asked(FULL, chunks(8), set(chunks(4)))

    assert match([full, asked(WINDOW, backwards(8, 1), held(7))]) == []
    assert match([full, asked(GUESSED, backwards(8, 1), held(7))]) == []


def test_the_match_of_a_mixed_model_ends_with_its_last_usable_window():
    """Chunks of the other group behind the window's end are not promoted, nor is what is left of it."""
    full = asked(FULL, chunks(12), set(chunks(12)))
    window = asked(WINDOW, backwards(12, 1), held(1, 2, 3, 4, 5, 6, 9, 10))

    assert {*chunks(7), *held(3, 4, 5, 6)} == set(match([full, window]))


def test_a_window_that_begins_inside_a_chunk_takes_one_more():
    """Where the match ends inside a window's chunk, vLLM's allocation reaches further to the left."""
    window = Reach(chunk_tokens=2 * CHUNK, window_chunks=2, window_tokens=4 * CHUNK - 1)
    wide = {key(i, 1): (i + 1) * 2 * CHUNK for i in reversed(range(4))}
    full = asked(FULL, chunks(8), {key(i) for i in range(5)})

    found = match([full, asked(window, wide, set(wide))])

    assert {*(key(i) for i in range(5)), *held(0, 1, 2)} == set(found)


def test_groups_that_kept_windows_at_different_points_meet_at_one_of_all():
    """A window that ends earlier is searched for again in every group."""
    full = asked(FULL, chunks(12), set(chunks(12)))
    states = [
        asked(STATE, backwards(12, 1), held(2, 5, 11)),
        asked(STATE, backwards(12, 2), held(2, 8, group=2)),
    ]

    assert {*chunks(3), *held(2), *held(2, group=2)} == set(match([full, *states]))


def test_what_vllm_did_not_ask_about_it_holds_itself():
    """Chunks in the CPU tier are never asked about, and break neither a run nor a window."""
    full = asked(FULL, {k: end for k, end in chunks(8).items() if k != key(2)}, set(chunks(8)))
    window = asked(WINDOW, {key(7, 1): 8 * CHUNK, key(5, 1): 6 * CHUNK}, held(5))

    assert {*chunks(7), *held(5)} - {key(2)} == set(match([full, window]))


def test_a_windowed_model_alone_takes_the_last_window_it_finds():
    """Of a prompt that is stored densely a window is loaded, not all of it."""
    window = asked(WINDOW, backwards(20), {key(i) for i in range(16)})

    assert [key(i) for i in range(12, 16)] == match([window])


def test_at_the_very_front_a_window_is_as_long_as_the_prompt():
    """What begins the prompt serves however short it is; a fragment elsewhere does not."""
    assert [key(0), key(1)] == match(
        [asked(WINDOW, backwards(8), {key(0), key(1), key(5), key(6)})]
    )


def test_vllm_finds_the_window_that_is_answered():
    """Its own search, key by key and back to front, ends where the match does."""
    lookup, keys = new_lookup(WINDOW), [key(i) for i in range(20)]
    assert scan_back(lookup, keys, needed=4) is None
    answer_all(lookup, set(keys[:16]))
    admit_all(lookup)

    assert 16 == scan_back(lookup, keys, needed=4)
    assert 4 == lookup.hits


def test_a_group_is_used_as_its_kind_is_and_not_as_it_was_asked_about():
    """Keys that come later lie behind those that were asked about first, back to front or not."""
    lookup, keys = new_lookup(WINDOW), [key(i) for i in range(10)]
    scan_back(lookup, keys[:6], needed=4)
    answer_all(lookup, set())
    lookup.decide([])
    scan_back(lookup, keys, needed=4)

    (question,) = answer_all(lookup, set(keys))

    assert not question.chained
    assert keys[6:] == lookup.wanted()


def test_a_bare_tier_takes_the_direction_of_the_first_scan_for_the_kind():
    """Without the front door nobody says how long a window is: all that is present may be of it."""
    lookup, keys = new_lookup(GUESSED), [key(i) for i in range(8)]
    scan_back(lookup, keys[:6], needed=4)
    answer_all(lookup, set())
    lookup.decide([])
    scan_back(lookup, keys, needed=4)
    answer_all(lookup, {keys[6], keys[7]})

    assert keys[6:] == lookup.wanted()


def test_a_match_that_does_not_fit_ends_where_it_serves():
    """With few slots the windows move with the end; what would be cut off them is of no use."""
    lookup = new_lookup(FULL, STATE)
    scan(lookup, list(chunks(12)))
    scan_back(lookup, list(chunks(12, 1)), needed=1)
    answer_all(lookup, {*chunks(12), *held(3, 7, 11)})

    assert 13 == len(lookup.wanted())
    assert {*chunks(8), *held(7)} == set(lookup.wanted(most=12))
    assert {*chunks(4), *held(3)} == set(lookup.wanted(most=8))
    assert [] == lookup.wanted(most=0)


def test_saved_tokens_reach_from_the_first_key_to_the_end_of_the_match():
    """One key is a chunk long, wherever it lies; a window stands for all that it spares."""
    lookup = new_lookup()
    lookup.ask(key(9), 10 * CHUNK)
    answer_all(lookup, {key(9)})
    assert CHUNK == lookup.saved_tokens(lookup.wanted())

    lookup = new_lookup(WINDOW)
    scan_back(lookup, [key(i) for i in range(20)], needed=4)
    answer_all(lookup, {key(i) for i in range(20)})
    assert 20 * CHUNK == lookup.saved_tokens(lookup.wanted())


def test_a_tail_is_promoted_when_every_group_has_it_and_belongs_to_no_chain():
    """Chunks that are not whole are asked for once vLLM knows how many whole ones hit: none, here."""
    lookup = new_lookup(FULL, STATE)
    tails = {end: (key(50 + end), key(50 + end, 1)) for end in (5, 9, 13)}
    for end, pair in reversed(tails.items()):
        for tail in pair:
            lookup.ask(tail, end)
    questions = answer_all(lookup, {*tails[5], *tails[9], tails[13][0]})

    assert not any(question.chained for question in questions)
    assert set(tails[9]) == set(lookup.wanted())


@given(st.sets(st.integers(0, 20)), st.integers(1, 20))
def test_a_match_is_always_a_gapless_run_of_present_chunks(stored, count):
    """For full attention the match is exactly the longest run from the front."""
    ends = chunks(count)
    present = {key(i) for i in stored if i < count}

    found = match([asked(FULL, ends, present)])

    run = next((i for i in range(count) if key(i) not in present), count)
    assert [key(i) for i in range(run)] == found


@given(
    st.integers(1, 24),
    st.sets(st.integers(0, 23)),
    st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 23))), max_size=3),
)
def test_a_match_is_what_vllm_then_finds(count, stored, windows):
    """Full attention first, then windows until all agree: its search over what was answered HIT."""
    kinds = [
        Reach(chunk_tokens=CHUNK, window_chunks=needed, window_tokens=needed * CHUNK - 1)
        for needed, _ in windows
    ]
    groups = [asked(FULL, chunks(count), {key(i) for i in stored})]
    for number, (kind, (_, kept)) in enumerate(zip(kinds, windows, strict=True), start=1):
        groups.append(asked(kind, backwards(count, number), held(*kept, group=number)))

    found = set(match(groups))

    assert all(found & set(group.ends) <= group.present for group in groups)
    assert reached([set(group.present) for group in groups], kinds, count) == reached(
        [found & set(group.ends) for group in groups], kinds, count
    )


def reached(groups: list[set[Key]], kinds: list[Reach], count: int) -> int:
    """Return how many chunks vLLM's lookup says hit when these keys are answered HIT."""
    end = next((i for i in range(count) if key(i) not in groups[0]), count)
    is_settled = False
    while not is_settled:
        is_settled = True
        for number, kind in enumerate(kinds, start=1):
            run, found = 0, 0
            for at in range(end - 1, -1, -1):
                run = run + 1 if key(at, number) in groups[number] else 0
                if run == kind.window_chunks:
                    found = at + run
                    break
            found = found or run
            is_settled &= found == end
            end = found
    return end


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
