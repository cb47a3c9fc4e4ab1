"""Which chunks of windows and of full attention the direct path keeps and needs: pure."""

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.vllm.direct.chunks import ChunkShape, chunk_step, is_kept, match_tokens

BLOCKS = (8, 16, 24)
MOST_TOKENS = 400


def shape(block: int, window: int | None, group: int = 0) -> ChunkShape:
    return ChunkShape(
        tokens_per_hash=8, tokens_per_block=block, blocks=1, group=group, window=window
    )


windows = st.none() | st.integers(1, 120)
shapes = st.lists(st.tuples(st.sampled_from(BLOCKS), windows), min_size=1, max_size=3).map(
    lambda groups: [shape(block, window, n) for n, (block, window) in enumerate(groups)]
)


def visible(one: ChunkShape, tokens: int) -> set[int]:
    """Return the chunks with a token that the one after ``tokens`` sees."""
    first = 0 if one.window is None else max(0, tokens + 1 - one.window)
    return {token // one.tokens for token in range(first, tokens)}


@given(shapes, st.data())
def test_a_match_is_the_longest_prefix_that_every_group_can_go_on_from(groups, data):
    """All that the next token sees is the engine's own or stored, and nothing longer would do."""
    present = [
        bytes(data.draw(st.lists(st.booleans(), max_size=MOST_TOKENS // one.tokens)))
        for one in groups
    ]
    step = chunk_step(groups)
    local = data.draw(st.integers(0, MOST_TOKENS // step)) * step
    most = data.draw(st.integers(0, MOST_TOKENS))

    def serves(tokens: int) -> bool:
        return all(
            number * one.tokens < local or (number < len(flags) and flags[number])
            for one, flags in zip(groups, present, strict=True)
            for number in visible(one, tokens)
        )

    expected = [tokens for tokens in range(local + step, most + 1, step) if serves(tokens)]
    assert max([local, *expected]) == match_tokens(
        groups, present, local_tokens=local, most_tokens=most
    )


@given(st.sampled_from(BLOCKS), windows, st.integers(0, 6), st.lists(st.integers(0, 24)))
def test_exactly_the_windows_at_boundaries_are_kept(block, window, interval, ends):
    """Each boundary finds its whole window; a chunk that no boundary needs is not stored."""
    one = shape(block, window)
    interval, ends = interval * block, [end * block for end in ends]
    multiples = range(interval, 3 * MOST_TOKENS, interval) if interval else ()
    needed = set().union(*(visible(one, boundary) for boundary in (*multiples, *ends)))

    for number in range(MOST_TOKENS // block):
        kept = is_kept(one, number, interval=interval, ends=ends)
        assert kept == (window is None or number in needed)


def test_a_window_reaches_over_several_chunks():
    """A window of 40 tokens in chunks of 16: after 64 tokens it sees the last three of them."""
    assert [0, 1, 2] == [shape(16, 40).first_needed(tokens) for tokens in (32, 64, 80)]
