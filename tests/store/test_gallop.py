"""Galloping finds the end of a closed chain with a logarithm of its length in probes."""

import doctest
import math

from hypothesis import given
from hypothesis import strategies as st

from prefixstore.store import gallop as module
from prefixstore.store.gallop import gallop


def test_examples_in_docstrings_hold() -> None:
    """The example that the docstring shows is what the function returns."""
    assert doctest.testmod(module).failed == 0


@given(st.integers(0, 10_000), st.data())
def test_the_end_of_a_closed_chain_is_found_exactly(count: int, data: st.DataObject) -> None:
    """Whatever the length, the answer is the number present and the probes are few."""
    there = data.draw(st.integers(0, count))
    probes: list[int] = []

    def present(position: int) -> bool:
        assert 0 <= position < count
        probes.append(position)
        return position < there

    assert there == gallop(count, present)
    assert len(probes) <= 2 * math.log2(count + 1) + 2
    assert len(probes) == len(set(probes))


@given(st.lists(st.booleans(), max_size=200))
def test_a_chain_with_holes_ends_where_something_is_missing(chain: list[bool]) -> None:
    """With holes the answer still names a present last chunk and an absent next one."""
    found = gallop(len(chain), chain.__getitem__)

    assert found == 0 or chain[found - 1]
    assert found == len(chain) or not chain[found]


def test_four_thousand_chunks_cost_two_dozen_probes() -> None:
    """The figure that the design promises."""
    worst = 0
    for there in range(0, 4097, 7):
        probes = 0

        def present(position: int, there: int = there) -> bool:
            nonlocal probes
            probes += 1
            return position < there

        gallop(4096, present)
        worst = max(worst, probes)

    assert worst <= 26
