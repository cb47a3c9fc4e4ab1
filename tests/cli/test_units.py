"""Sizes and ages: what people write is read exactly, what cannot be read is refused."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixstore.cli import units
from prefixstore.errors import InvalidError


def test_examples_in_docstrings_hold() -> None:
    """The examples that the docstrings show are what the functions return."""
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1024),
        ("1kB", 1000),
        ("10GiB", 10 * 2**30),
        (" 2 TB ", 2 * 10**12),
    ],
)
def test_sizes_are_read_in_both_kinds_of_unit(text: str, expected: int) -> None:
    """Binary and decimal units are read, with or without a space."""
    assert expected == units.parse_size(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "10 XB", "1.2.3", "9" * 40])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    """The error repeats the text and shows how to write it."""
    with pytest.raises(InvalidError, match="10GiB"):
        units.parse_size(text)


@pytest.mark.parametrize("text", ["", "d", "-7d", "7 years", "soon"])
def test_what_is_no_age_is_refused_by_name(text: str) -> None:
    """The error repeats the text and shows how to write it."""
    with pytest.raises(InvalidError, match="7d"):
        units.parse_age(text)


@given(st.integers(min_value=0, max_value=2**60))
def test_a_printed_size_reads_back_within_rounding(size_bytes: int) -> None:
    """Printing and reading again loses at most the digit that was rounded."""
    assert units.parse_size(units.format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@given(st.integers(min_value=0, max_value=10**9))
def test_a_printed_age_never_needs_more_than_two_units(age_s: int) -> None:
    """Ages stay short enough for a table."""
    assert len(units.format_age(age_s).split()) <= 2
