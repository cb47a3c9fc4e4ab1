"""The index in memory is bounded."""

from contextlib import closing

from prefixstore.index.memory_index import MemoryIndex
from prefixstore.testing.index_contract import ONE, chain, check_counts, entries


def test_the_youngest_are_forgotten():
    """Beyond its limit it forgets what eviction would take last, tells that, and its counts stay right."""
    keys = chain(100)
    with closing(MemoryIndex(rows_max=80)) as index:
        index.put_many(entries(keys[:80], used_s=1))
        assert not index.has_forgotten
        index.put_many(entries(keys[90:], used_s=2))
        left = [row.key for row in index.scan()]
        assert keys[10:80] == left
        assert index.has_forgotten
        check_counts(index, [(ONE, key) for key in keys])
        index.clear()
        assert not index.has_forgotten


def test_one_large_put_is_bounded():
    """A call longer than the limit leaves no more rows than the limit."""
    with closing(MemoryIndex(rows_max=64)) as index:
        index.put_many(entries(chain(1000), used_s=1))
        assert index.totals()[ONE].chunks <= 64
        check_counts(index)
