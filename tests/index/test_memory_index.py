"""The index in memory is bounded."""

from contextlib import closing

from prefixstore.index.followed import Followed
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.index.records import RowKey
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


def test_with_a_row_goes_all_that_it_follows():
    """A parent that looks older than its child must not look as if nothing followed it."""
    keys, others = chain(10), chain(80, seed=1)
    with closing(MemoryIndex(rows_max=80)) as index:
        index.put_many(entries(keys, used_s=1)[:-1])
        index.put_many(entries(keys, used_s=9)[-1:])
        index.put_many(entries(others, used_s=2))
        assert index.has_forgotten
        assert index.get_many(ONE, keys) == [None] * 10
        check_counts(index, [(ONE, key) for key in keys])


def test_what_a_forgotten_row_follows_stays_away_until_all_is_told_anew():
    """A scan meets chunks in the order of their keys, parents after their children, too."""
    keys, others = chain(3), chain(80, seed=1)
    old, young = entries(keys, used_s=1)[:2], entries(keys, used_s=9)[2:]
    with closing(MemoryIndex(rows_max=80)) as index:
        index.put_many(entries(others, used_s=2))
        index.put_many(young)
        index.put_many(old[1:])
        index.put_many(old[:1])
        assert index.get_many(ONE, keys) == [None] * 3

        index.remove_many(ONE, others)
        index.renew()
        assert not index.has_forgotten
        index.put_many([*young, *old])
        assert None not in index.get_many(ONE, keys)
        check_counts(index)


def test_nothing_that_was_added_is_denied():
    """It may say yes to what was not added, and seldom does."""
    followed = Followed()
    rows = [RowKey(bytes(16) + key) for key in chain(2000)]
    for row_key in rows[:1000]:
        followed.add(row_key)
    assert all(row_key in followed for row_key in rows[:1000])
    assert not any(row_key in followed for row_key in rows[1000:])
