"""What forgotten rows followed, remembered in bounded memory: "yes" is wrong now and then, "no" never.

A Bloom filter. A row that is taken for one that has a forgotten child is forgotten, too, and costs a probe of
the tree; a parent whose child was forgotten unnoticed would be evicted before it.
"""

import xxhash

from prefixstore.index.records import RowKey

__all__ = ["Followed"]

PLACE_BITS = 27
PLACES = 4
"""16 MiB and four places for each row. Once ten million rows were forgotten one in two hundred others is taken
for one of them, of a hundred million nearly all: then little can be evicted, and only LMDB helps."""
PLACE_MASK = 2**PLACE_BITS - 1


class Followed:
    """A set of rows that only grows. Not safe for concurrent use: the index's lock is held around it."""

    def __init__(self) -> None:
        self._bits = bytearray(2**PLACE_BITS // 8)

    def add(self, row_key: RowKey) -> None:
        """Remember a row, stored or not."""
        for at, bit in _places(row_key):
            self._bits[at] |= 1 << bit

    def __contains__(self, row_key: RowKey) -> bool:
        return all(self._bits[at] >> bit & 1 for at, bit in _places(row_key))


def _places(row_key: RowKey) -> list[tuple[int, int]]:
    """Return which bits stand for a row, as byte and bit."""
    digest = xxhash.xxh3_128_intdigest(row_key)
    return [divmod(digest >> PLACE_BITS * number & PLACE_MASK, 8) for number in range(PLACES)]
