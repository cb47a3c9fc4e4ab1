"""The bytes of a row, and how two records of one key become one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixstore.errors import InvalidError
from prefixstore.index.base import Totals
from prefixstore.index.limits import gallop
from prefixstore.index.notes import (
    decode_mark,
    decode_sums,
    encode_mark,
    encode_sums,
    mark_key,
    sums_key,
    sums_namespace,
)
from prefixstore.index.records import (
    COUNT_MAX,
    Record,
    decode_count,
    decode_row,
    encode_count,
    encode_row,
    merge,
    namespace_prefix,
    recency_key,
    recency_row_key,
    split_row_key,
)
from prefixstore.keys import Key, NamespaceId

ONE = NamespaceId("11" * 16)
ROW_KEY = namespace_prefix(ONE) + b"k" * 36
counts = st.integers(0, COUNT_MAX)
keys = st.binary(min_size=12, max_size=64).map(Key)
records = st.builds(
    Record,
    file_bytes=counts,
    raw_bytes=counts,
    end_token=counts,
    parent=st.none() | keys,
    used_s=counts,
    touched_s=counts,
    presumed=st.booleans(),
)


def test_the_layout_is_as_documented():
    """One row, byte by byte: a change of it needs a new version."""
    record = Record(
        file_bytes=0x01020304,
        raw_bytes=2,
        end_token=3,
        parent=Key(b"parent-of-it"),
        used_s=4,
        touched_s=5,
        presumed=True,
    )
    expected = (
        "01010c00 04030201 02000000 03000000 04000000 05000000 06000000706172656e742d6f662d6974"
    )
    value = encode_row(ROW_KEY, record, children=6)
    assert bytes.fromhex(expected) == value[:-4]


@given(record=records, children=counts, key=keys)
def test_rows_come_back(record, children, key):
    """Decoding is the inverse of encoding."""
    row_key = namespace_prefix(ONE) + key
    assert (record, children) == decode_row(row_key, encode_row(row_key, record, children=children))
    assert (ONE, key) == split_row_key(row_key)


@given(record=records, at=st.integers(0), bit=st.integers(0, 7))
def test_flipped_bits_are_found(record, at, bit):
    """No single bit of a value or of its key can change unseen."""
    value = bytearray(encode_row(ROW_KEY, record, children=1))
    value[at % len(value)] ^= 1 << bit
    assert decode_row(ROW_KEY, bytes(value)) is None
    key = bytearray(ROW_KEY)
    key[at % len(key)] ^= 1 << bit
    assert decode_row(bytes(key), encode_row(ROW_KEY, record, children=1)) is None


@given(value=st.binary(max_size=120))
def test_noise_is_no_row(value):
    """Any bytes are either refused or, once in four thousand million, a row."""
    assert decode_row(ROW_KEY, value) is None
    assert decode_count(ROW_KEY, value) is None
    assert decode_sums(b"s", value) is None
    assert decode_mark(b"m", value) is None


@given(count=counts)
def test_counters(count):
    """Counters come back and cover their key."""
    value = encode_count(ROW_KEY, count)
    assert count == decode_count(ROW_KEY, value)
    assert decode_count(ROW_KEY + b"x", value) is None


@pytest.mark.parametrize("count", [-1, COUNT_MAX + 1])
def test_counters_have_a_range(count):
    """What does not fit is refused."""
    with pytest.raises(InvalidError):
        encode_count(ROW_KEY, count)


def test_parents_are_keys():
    """A parent longer than any key is refused."""
    with pytest.raises(InvalidError, match="parent"):
        encode_row(ROW_KEY, Record(parent=Key(bytes(65))), children=0)


@given(text=st.text(min_size=1), totals=st.builds(Totals, *[st.integers(0, 2**64 - 1)] * 3))
def test_notes(text, totals):
    """Marks and sums come back under their own keys only."""
    key = mark_key("name")
    assert text == decode_mark(key, encode_mark(key, text))
    assert decode_mark(mark_key("eman"), encode_mark(key, text)) is None
    key = sums_key(namespace_prefix(ONE))
    assert totals == decode_sums(key, encode_sums(key, totals))
    assert ONE == sums_namespace(key)


@given(one=st.tuples(counts, counts, keys), two=st.tuples(counts, counts, keys))
def test_recency_sorts_as_evicted(one, two):
    """Bytes sort by time first, then from the deepest, then by name."""
    places = [recency_key(key, used_s=used_s, end_token=end) for used_s, end, key in (one, two)]
    ranks = [(used_s, -end, key) for used_s, end, key in (one, two)]
    assert (ranks[0] < ranks[1]) == (places[0] < places[1])
    assert [one[2], two[2]] == [recency_row_key(place) for place in places]


@given(old=records, new=records)
def test_merge_only_learns(old, new):
    """Nothing that is known becomes unknown, no time goes back, and merging again changes nothing."""
    both = merge(old, new)
    assert merge(both, new) == both
    assert merge(old, old) == old
    assert both.used_s == max(old.used_s, new.used_s)
    assert both.touched_s == max(old.touched_s, new.touched_s)
    assert both.presumed == (old.presumed and new.presumed)
    for field in ("file_bytes", "raw_bytes", "end_token", "parent"):
        assert getattr(both, field) == (getattr(new, field) or getattr(old, field))


@given(length=st.integers(0, 5000), known=st.integers(0, 5000))
def test_gallop(length, known):
    """Without a hole the answer is exact, and few places are looked at."""
    known = min(known, length)
    asked = []
    assert known == gallop(length, lambda at: asked.append(at) or at < known)
    assert len(asked) <= 2 * length.bit_length() + 1
    assert len(set(asked)) == len(asked)


@given(length=st.integers(0, 60), holes=st.sets(st.integers(0, 59)))
def test_gallop_over_holes(length, holes):
    """The answer ends at a known place that an unknown one or the end follows."""
    found = gallop(length, lambda at: at not in holes)
    assert found == 0 or found - 1 not in holes
    assert found == length or found in holes
