"""Which bytes of a slot belong to a chunk."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.vllm.layout import SlotLayout, Span, join_workers, merge_spans

spans = st.lists(st.builds(Span, st.integers(0, 100), st.integers(1, 20)), max_size=12)


def covered(found):
    return {byte for span in found for byte in range(span.offset, span.offset + span.length)}


@given(spans)
def test_merging_covers_the_same_bytes_in_order_and_apart(given_spans):
    """Merged spans name each byte once, in ascending order, with gaps between them."""
    merged = merge_spans(given_spans)

    assert covered(given_spans) == covered(merged)
    assert all(a.offset + a.length < b.offset for a, b in itertools.pairwise(merged))


def test_the_pages_of_workers_follow_each_other_in_rank_order():
    """Rank 1's spans start where rank 0's page ends, and full pages join into one span."""
    whole = SlotLayout(page_bytes=100, spans={0: [Span(0, 100)], 1: [Span(10, 20)]})

    joined = join_workers([whole, whole])

    assert [Span(0, 200)] == joined[0]
    assert [Span(10, 20), Span(110, 20)] == joined[1]
