"""Small pure rules that every index shares: how a chain is galloped, what a mark may hold."""

from collections.abc import Callable

from prefixstore.errors import InvalidError
from prefixstore.index.base import MARK_NAME_CHARS_MAX, MARK_VALUE_CHARS_MAX

__all__ = ["check_mark", "gallop"]


def gallop(length: int, known: Callable[[int], bool]) -> int:
    """Return how many leading places are known, asking about ``2 * log2(length)`` of them.

    Steps of 1, 2, 4, ... until one is unknown, then halves the gap.

    >>> asked = []
    >>> gallop(4096, lambda at: asked.append(at) or at < 1000)
    1000
    >>> len(asked)
    19
    """
    low, step = 0, 1
    high = length
    while low < length:
        at = min(low + step, length) - 1
        if not known(at):
            high = at
            break
        low = at + 1
        step *= 2
    while low < high:
        middle = (low + high) // 2
        if known(middle):
            low = middle + 1
        else:
            high = middle
    return low


def check_mark(name: str, value: str | None) -> None:
    """Refuse a mark that is too long.

    Raises:
        InvalidError: The name or the value is empty or above its limit.
    """
    if not 0 < len(name) <= MARK_NAME_CHARS_MAX:
        raise InvalidError(
            f"a mark's name has 1 to {MARK_NAME_CHARS_MAX} characters: {name[:80]!r}"
        )
    if value is not None and not 0 < len(value) <= MARK_VALUE_CHARS_MAX:
        raise InvalidError(
            f"a mark's value has 1 to {MARK_VALUE_CHARS_MAX} characters, {name!r} has {len(value)}"
        )
