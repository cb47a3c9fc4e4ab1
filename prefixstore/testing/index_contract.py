"""The contract of ``prefixstore.index.base.Index`` as tests that any index can inherit.

    class TestMyIndex(IndexContract):
        @pytest.fixture
        def index(self):
            with MyIndex(...) as index:
                yield index

``recount`` derives the refcounts from the rows alone, by the definition in the contract; nothing
here trusts the counts of the index under test. Needs pytest, which only this module imports.
"""

# ruff: noqa: PLR2004, SIM300 - these are tests: plain numbers, and expected == actual

from collections import Counter
from collections.abc import Iterable

import msgspec
import pytest

from prefixstore.errors import ClosedError, InvalidError
from prefixstore.index.base import Address, Index, Refs, Totals
from prefixstore.index.records import COUNT_MAX, Record
from prefixstore.keys import Key, NamespaceId

__all__ = ["IndexContract", "chain", "check_counts", "entries", "recount"]

ONE = NamespaceId("11" * 16)
TWO = NamespaceId("22" * 16)


def chain(length: int, *, seed: int = 0) -> list[Key]:
    """Return the keys of a made-up chain; another seed shares none of them."""
    return [Key(f"{seed:012x}{at:012x}".encode() + bytes(4)) for at in range(length)]


def entries(
    keys: list[Key], *, used_s: int, namespace: NamespaceId = ONE, file_bytes: int = 8192
) -> list[tuple[NamespaceId, Key, Record]]:
    """Return what a store that wrote the whole chain would tell the index."""
    return [
        (
            namespace,
            key,
            Record(
                file_bytes=file_bytes,
                raw_bytes=4096,
                end_token=16 * (at + 1),
                parent=keys[at - 1] if at else None,
                used_s=used_s,
            ),
        )
        for at, key in enumerate(keys)
    ]


def recount(index: Index) -> Counter[Address]:
    """Return the children of every key, counted from the rows alone."""
    return Counter(
        (row.namespace, row.record.parent) for row in index.scan() if row.record.parent is not None
    )


def check_counts(index: Index, known: Iterable[Address] = ()) -> None:
    """Compare every count and sum that the index keeps with one made from its rows.

    Args:
        index: Any index that nobody changes meanwhile.
        known: Keys to check besides those that rows or their parents name.
    """
    children = recount(index)
    rows = list(index.scan())
    for address in {*known, *children, *((row.namespace, row.key) for row in rows)}:
        assert children[address] == index.refs(*address).children, address
    assert [row.refs.children for row in rows] == [children[row.namespace, row.key] for row in rows]
    sums: dict[NamespaceId, Totals] = {}
    for row in rows:
        chunks, file_bytes, presumed = sums.get(row.namespace, (0, 0, 0))
        sums[row.namespace] = Totals(
            chunks + 1, file_bytes + row.record.file_bytes, presumed + row.record.presumed
        )
    assert sums == index.totals()
    order = [(row.record.used_s, -row.record.end_token, row.namespace, row.key) for row in rows]
    assert sorted(order) == [
        (row.record.used_s, -row.record.end_token, row.namespace, row.key)
        for row in index.oldest_first()
    ]


class IndexContract:
    """Inherit, and provide a fixture ``index`` that yields a new, empty index."""

    def test_new_index_knows_nothing(self, index: Index) -> None:
        """A new index has no rows, sums, marks or refcounts."""
        keys = chain(3)
        assert [None, None, None] == index.get_many(ONE, keys)
        assert index.known_prefix(ONE, keys) == 0
        assert Refs(0, 0) == index.refs(ONE, keys[0])
        assert index.row(ONE, keys[0]) is None
        assert [] == list(index.scan())
        assert [] == list(index.oldest_first())
        assert {} == index.totals()
        assert index.mark("rebuilt") is None

    def test_put_then_get(self, index: Index) -> None:
        """Answers come in the order of the question, with None for the unknown."""
        keys = chain(3)
        put = entries(keys[:2], used_s=7)
        index.put_many(put)
        assert [put[1][2], None, put[0][2], put[0][2]] == index.get_many(
            ONE, [keys[1], keys[2], keys[0], keys[0]]
        )
        check_counts(index)

    def test_what_is_told_anew_is_known_as_before(self, index: Index) -> None:
        """To expect a scan of everything loses neither rows, refcounts nor marks."""
        keys = chain(3)
        put = entries(keys, used_s=7)
        index.put_many(put)
        index.set_pins({(ONE, keys[0]): 1})
        index.set_mark("rebuilt", "yes")
        index.renew()
        index.put_many(put[:2])
        assert [record for _, _, record in put] == index.get_many(ONE, keys)
        assert Refs(1, 1) == index.refs(ONE, keys[0])
        assert index.mark("rebuilt") == "yes"
        assert not index.has_forgotten
        check_counts(index)

    def test_nothing_asked_nothing_done(self, index: Index) -> None:
        """Empty lists are fine everywhere."""
        assert [] == index.get_many(ONE, [])
        assert index.known_prefix(ONE, []) == 0
        index.put_many([])
        assert index.remove_many(ONE, []) == 0
        assert [] == index.touch_many(ONE, [], used_s=1)
        index.set_pins({})
        check_counts(index)

    def test_namespaces_are_apart(self, index: Index) -> None:
        """One key in two namespaces is two rows with refcounts of their own."""
        keys = chain(2)
        index.put_many(entries(keys, used_s=1))
        index.put_many(entries(keys[1:], used_s=2, namespace=TWO))
        assert index.get_many(TWO, keys)[0] is None
        assert [ONE, ONE, TWO] == [row.namespace for row in index.scan()]
        assert [keys[1]] == [row.key for row in index.scan(TWO)]
        assert [keys[1]] == [row.key for row in index.oldest_first(TWO)]
        assert Totals(1, 8192, 0) == index.totals()[TWO]
        index.remove_many(ONE, keys)
        assert [TWO] == list(index.totals())
        check_counts(index)

    def test_fields_survive(self, index: Index) -> None:
        """Every field comes back as it was put, at both ends of its range."""
        key = chain(1)[0]
        record = Record(
            file_bytes=COUNT_MAX,
            raw_bytes=COUNT_MAX,
            end_token=COUNT_MAX,
            parent=Key(b"\xff" * 64),
            used_s=COUNT_MAX,
            touched_s=COUNT_MAX,
            presumed=True,
        )
        index.put_many([(ONE, key, record), (TWO, key, Record())])
        assert [record] == index.get_many(ONE, [key])
        assert [Record()] == index.get_many(TWO, [key])
        check_counts(index)

    @pytest.mark.parametrize(
        "field", ["file_bytes", "raw_bytes", "end_token", "used_s", "touched_s"]
    )
    @pytest.mark.parametrize("value", [-1, COUNT_MAX + 1])
    def test_out_of_range_writes_nothing(self, index: Index, field: str, value: int) -> None:
        """A record that a row cannot hold is refused with all of its batch."""
        keys = chain(2)
        bad = (ONE, keys[1], msgspec.structs.replace(Record(), **{field: value}))
        with pytest.raises(InvalidError):
            index.put_many([*entries(keys[:1], used_s=1), bad])
        assert [] == list(index.scan())
        check_counts(index)

    def test_put_keeps_what_is_known(self, index: Index) -> None:
        """A vaguer record neither erases facts nor takes back recency."""
        keys = chain(2)
        put = entries(keys, used_s=9)
        index.put_many(put)
        index.put_many([(ONE, key, Record(used_s=3, presumed=True)) for key in keys])
        assert [put[0][2], put[1][2]] == index.get_many(ONE, keys)
        check_counts(index)

    def test_presumed_becomes_certain(self, index: Index) -> None:
        """What was presumed takes its sizes and parent from the blob's header later."""
        keys = chain(2)
        index.put_many([(ONE, key, Record(used_s=5, presumed=True)) for key in keys])
        assert {ONE: Totals(2, 0, 2)} == index.totals()
        assert Refs(0, 0) == index.refs(ONE, keys[0])
        index.put_many(entries(keys, used_s=4))
        assert {ONE: Totals(2, 16384, 0)} == index.totals()
        assert Refs(1, 0) == index.refs(ONE, keys[0])
        assert [5, 5] == [row.record.used_s for row in index.scan()]
        check_counts(index)

    def test_children_may_come_first(self, index: Index) -> None:
        """Children count for a parent without a row, and stay when its row comes, goes and comes."""
        keys = chain(4)
        put = entries(keys, used_s=1)
        index.put_many(put[::-1][:3])
        assert Refs(1, 0) == index.refs(ONE, keys[0])
        index.put_many(put[:1])
        assert Refs(1, 0) == index.refs(ONE, keys[0])
        assert index.remove_many(ONE, keys[:1]) == 1
        assert Refs(1, 0) == index.refs(ONE, keys[0])
        check_counts(index, [(ONE, key) for key in keys])
        assert index.remove_many(ONE, keys[1:2]) == 1
        assert Refs(0, 0) == index.refs(ONE, keys[0])
        check_counts(index, [(ONE, key) for key in keys])

    def test_many_children(self, index: Index) -> None:
        """A fork in the prefixes counts each branch once, however often it is put."""
        root = chain(1)[0]
        leaves = chain(5, seed=1)
        index.put_many(entries([root], used_s=1))
        for _ in range(2):
            index.put_many([(ONE, leaf, Record(parent=root, used_s=2)) for leaf in leaves])
        assert Refs(5, 0) == index.refs(ONE, root)
        assert index.remove_many(ONE, [*leaves[:2], leaves[0]]) == 2
        assert Refs(3, 0) == index.refs(ONE, root)
        check_counts(index)

    def test_one_batch_with_repeats(self, index: Index) -> None:
        """A key that comes twice in one call counts once and merges in order."""
        parent, key = chain(2)
        index.put_many(
            [
                (ONE, key, Record(used_s=5, presumed=True)),
                (ONE, key, Record(file_bytes=10, parent=parent, used_s=3)),
                (ONE, key, Record(file_bytes=20, parent=parent, used_s=4)),
            ]
        )
        assert [Record(file_bytes=20, parent=parent, used_s=5)] == index.get_many(ONE, [key])
        assert Refs(1, 0) == index.refs(ONE, parent)
        check_counts(index)

    def test_parent_of_itself(self, index: Index) -> None:
        """A record that names its own key as parent (no chain does) keeps the counts right."""
        key = chain(1)[0]
        index.put_many([(ONE, key, Record(parent=key, used_s=1))])
        assert Refs(1, 0) == index.refs(ONE, key)
        check_counts(index)
        assert index.remove_many(ONE, [key]) == 1
        assert Refs(0, 0) == index.refs(ONE, key)
        check_counts(index)

    def test_remove_is_idempotent(self, index: Index) -> None:
        """Removing says how many rows went, none the second time."""
        keys = chain(3)
        index.put_many(entries(keys, used_s=1))
        assert index.remove_many(ONE, [*keys, *keys]) == 3
        assert index.remove_many(ONE, keys) == 0
        assert {} == index.totals()
        check_counts(index, [(ONE, key) for key in keys])

    @pytest.mark.parametrize("known", [0, 1, 2, 3, 7, 8, 9, 63, 100])
    def test_known_prefix(self, index: Index, known: int) -> None:
        """The leading known keys of a chain are counted exactly when there is no hole."""
        keys = chain(100)
        index.put_many(entries(keys[:known], used_s=1))
        assert known == index.known_prefix(ONE, keys)

    def test_known_prefix_ends_at_a_known_key(self, index: Index) -> None:
        """With holes, the last counted key is known and the next is not."""
        keys = chain(64)
        put = entries(keys, used_s=1)
        for hole in range(64):
            index.clear()
            index.put_many(put)
            index.remove_many(ONE, [keys[hole]])
            count = index.known_prefix(ONE, keys)
            around = index.get_many(ONE, keys[max(count - 1, 0) : count + 1])
            assert [row is not None for row in around] in ([True, False], [False], [True])

    def test_touch_raises_recency_only(self, index: Index) -> None:
        """A touch moves known rows up, never down, and learns nothing new."""
        keys = chain(3)
        index.put_many(entries(keys[:2], used_s=10))
        assert [] == index.touch_many(ONE, keys, used_s=12)
        assert [] == index.touch_many(ONE, keys, used_s=11)
        assert [12, 12] == [row.record.used_s for row in index.scan()]
        assert [keys[1], keys[0]] == [row.key for row in index.oldest_first()]
        check_counts(index)

    def test_touch_says_what_is_due_on_disk(self, index: Index) -> None:
        """Each blob is due once in an interval, at the first touch that finds it due."""
        keys = chain(2)
        index.put_many(entries(keys, used_s=10))
        assert keys == index.touch_many(ONE, keys, used_s=1000, refresh_s=600)
        assert [] == index.touch_many(ONE, keys, used_s=1599, refresh_s=600)
        assert keys[:1] == index.touch_many(ONE, keys[:1], used_s=1600, refresh_s=600)
        assert keys[1:] == index.touch_many(ONE, keys, used_s=1601, refresh_s=600)
        check_counts(index)

    def test_repeats_in_a_touch(self, index: Index) -> None:
        """A key named twice is due once."""
        key = chain(1)[0]
        index.put_many(entries([key], used_s=1))
        assert [key] == index.touch_many(ONE, [key, key], used_s=5000, refresh_s=60)

    def test_touch_out_of_range(self, index: Index) -> None:
        """Times that no row can hold are refused."""
        for used_s in (-1, COUNT_MAX + 1):
            with pytest.raises(InvalidError):
                index.touch_many(ONE, chain(1), used_s=used_s)

    def test_order_of_eviction(self, index: Index) -> None:
        """Oldest first; within one second the deepest first, whatever the key."""
        early, late = chain(3, seed=2), chain(3, seed=1)
        index.put_many(entries(late, used_s=20))
        index.put_many(entries(early, used_s=10))
        assert [*early[::-1], *late[::-1]] == [row.key for row in index.oldest_first()]

    def test_pins_follow_the_truth(self, index: Index) -> None:
        """``set_pins`` replaces all pins, for keys with and without a row."""
        keys = chain(3)
        index.put_many(entries(keys[:1], used_s=1))
        index.set_pins({(ONE, keys[0]): 2, (ONE, keys[1]): 1, (TWO, keys[0]): 1})
        assert [2, 1, 0] == [index.refs(ONE, key).pins for key in keys]
        assert index.refs(TWO, keys[0]).pins == 1
        row = index.row(ONE, keys[0])
        assert row is not None
        assert Refs(0, 2) == row.refs
        index.set_pins({(ONE, keys[0]): 1, (ONE, keys[2]): 3, (ONE, keys[1]): 0})
        assert [1, 0, 3] == [index.refs(ONE, key).pins for key in keys]
        assert index.refs(TWO, keys[0]).pins == 0
        check_counts(index)

    def test_pins_outlive_rows(self, index: Index) -> None:
        """A pin stays when its row goes, and holds the row that comes back."""
        key = chain(1)[0]
        index.put_many(entries([key], used_s=1))
        index.set_pins({(ONE, key): 1})
        index.remove_many(ONE, [key])
        assert Refs(0, 1) == index.refs(ONE, key)
        index.put_many(entries([key], used_s=1))
        assert [Refs(0, 1)] == [row.refs for row in index.oldest_first()]

    def test_marks(self, index: Index) -> None:
        """Marks are kept, replaced and removed, and are no rows."""
        index.set_mark("cursor", "a/b")
        index.set_mark("cursor", "ä" * 100)
        assert index.mark("cursor") == "ä" * 100
        assert {} == index.totals()
        index.set_mark("cursor", None)
        index.set_mark("cursor", None)
        assert index.mark("cursor") is None

    @pytest.mark.parametrize(("name", "value"), [("", "x"), ("n" * 65, "x"), ("n", "x" * 4097)])
    def test_marks_are_small(self, index: Index, name: str, value: str) -> None:
        """A mark is no place for data."""
        with pytest.raises(InvalidError):
            index.set_mark(name, value)

    def test_namespace_ids_are_checked(self, index: Index) -> None:
        """What is no namespace id is refused by name."""
        for wrong in ("", "xyz", "11" * 15, "11" * 17):
            with pytest.raises(InvalidError, match="32 hex digits"):
                index.get_many(NamespaceId(wrong), [])

    def test_clear(self, index: Index) -> None:
        """Nothing is left, and the index goes on."""
        keys = chain(3)
        index.put_many(entries(keys[1:], used_s=1))
        index.set_pins({(ONE, keys[0]): 1})
        index.set_mark("rebuilt", "yes")
        index.clear()
        assert Refs(0, 0) == index.refs(ONE, keys[0])
        assert index.mark("rebuilt") is None
        check_counts(index, [(ONE, key) for key in keys])
        index.put_many(entries(keys, used_s=1))
        check_counts(index)

    def test_walks_survive_changes(self, index: Index) -> None:
        """A walk ends although every row it yields is touched and others are added or removed."""
        keys = chain(3000)
        index.put_many(entries(keys, used_s=1))
        seen = []
        for at, row in enumerate(index.oldest_first()):
            seen.append(row.key)
            if at % 100 == 0:
                index.touch_many(ONE, [row.key], used_s=2 + at)
                index.put_many(entries(chain(1, seed=at + 1), used_s=2 + at))
                index.remove_many(ONE, [keys[0]])
        assert set(keys[1:]) <= set(seen)
        assert len(seen) <= 3000 + 2 * 30
        check_counts(index)

    def test_many_batches(self, index: Index) -> None:
        """Calls longer than any batch are whole in the end."""
        keys = chain(9000)
        index.put_many(iter(entries(keys, used_s=1)))
        assert index.known_prefix(ONE, keys) == 9000
        assert all(index.get_many(ONE, keys))
        assert keys[::-1] == [row.key for row in index.oldest_first()]
        assert keys == index.touch_many(ONE, keys, used_s=90, refresh_s=5)
        assert index.remove_many(ONE, keys[1:]) == 8999
        check_counts(index)

    def test_closed_is_closed(self, index: Index) -> None:
        """After ``close`` everything raises, and closing again does not."""
        index.close()
        index.close()
        with pytest.raises(ClosedError):
            index.get_many(ONE, chain(1))
        with pytest.raises(ClosedError):
            index.put_many(entries(chain(1), used_s=1))
        with pytest.raises(ClosedError):
            next(index.oldest_first())
