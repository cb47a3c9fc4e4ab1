"""Find how far a chain reaches with few probes. Pure: the probe is passed in.

Stored prefixes are closed: a chunk is evicted before its parent is. So presence along a chain looks
like ``1 1 1 ... 1 0 0 ... 0``, and the edge is found by doubling steps and then halving them:

    chain    1 1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0
    probes   ^ ^   ^       ^               ^              doubling: steps 0, 1, 3, 7, 15
                             ^ . ^ ^                      halving between 7 and 15

That is at most 2 log2(n) + 2 probes for n chunks: 26 for 4096, where one probe each costs 4096 round
trips. A chain can have holes for a while (a lost file, a writer that was killed): a probe then sees
past the hole and the missing chunk turns up as one miss at load, which every caller must expect.
"""

from collections.abc import Callable

__all__ = ["gallop"]


def gallop(count: int, present: Callable[[int], bool]) -> int:
    """Return how many of ``count`` chunks are there, taking the chain to be closed.

    Args:
        count: The number of chunks in the chain.
        present: Says whether the chunk at a position, 0 to ``count - 1``, is there.

    >>> gallop(21, lambda position: position < 11)
    11
    """
    found = 0  # Every position below is taken to be present.
    step = 1
    absent = count
    while found < absent:
        position = min(found + step, absent) - 1
        if not present(position):
            absent = position
            break
        found = position + 1
        step *= 2
    while found < absent:
        position = (found + absent) // 2
        if present(position):
            found = position + 1
        else:
            absent = position
    return found
