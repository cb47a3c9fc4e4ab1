"""The eviction policy keeps its rule on every forest of chains."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import (
    Candidate,
    EvictionReason,
    least_recently_used,
    plan_eviction,
)

ONE = NamespaceId("11" * 16)
TWO = NamespaceId("22" * 16)


def make(name, *, parent=None, used_s=0, end_token=0, children=0, pins=0, file_bytes=10):
    """Return a candidate with a readable key."""
    return Candidate(
        namespace=ONE,
        key=key_of(name),
        parent=None if parent is None else key_of(parent),
        file_bytes=file_bytes,
        used_s=used_s,
        end_token=end_token,
        children=children,
        pins=pins,
    )


def key_of(name):
    """Return a key that shows ``name``."""
    return Key(str(name).encode().rjust(12, b"."))


def forest(chunks):
    """Order candidates as an index would, and count their children from their parents."""
    counted = [
        chunk._replace(
            children=sum(
                other.parent == chunk.key and other.namespace == chunk.namespace for other in chunks
            )
        )
        for chunk in chunks
    ]
    return sorted(counted, key=least_recently_used)


def plan(chunks, *, busy=frozenset(), **limits):
    """Plan over a fixed set of chunks."""
    known = {chunk.address: chunk for chunk in chunks}
    return plan_eviction(
        iter(chunks),
        find=lambda namespace, key: known.get((namespace, key)),
        busy=lambda namespace, key: (namespace, key) in busy,
        **limits,
    )


def names(found):
    """Return the names of a plan's victims, in order."""
    return [victim.key.decode().strip(".") for victim in found.victims]


def by_the_book(chunks, *, busy, free_bytes, used_before_s, order=least_recently_used):
    """Evict by the rule's own words, looking at every chunk before each choice."""
    left = {chunk.address: chunk for chunk in chunks}
    gone, freed = [], 0
    while True:
        evictable = [
            chunk
            for chunk in left.values()
            if not chunk.pins
            and chunk.address not in busy
            and not any((other.namespace, other.parent) == chunk.address for other in left.values())
        ]
        if not evictable:
            return gone, freed
        oldest = min(evictable, key=order)
        if freed >= free_bytes and oldest.used_s >= used_before_s:
            return gone, freed
        gone.append(left.pop(oldest.address))
        freed += oldest.file_bytes


@st.composite
def forests(draw):
    """Chunks whose parent is an earlier chunk, a chunk that is not stored, or none."""
    chunks = []
    for at in range(draw(st.integers(0, 14))):
        parent = draw(st.one_of(st.none(), st.just("lost"), st.integers(0, max(0, at - 1))))
        chunks.append(
            make(
                at,
                parent=parent if parent == "lost" or at else None,
                used_s=draw(st.integers(0, 6)),
                end_token=draw(st.integers(0, 3)) * 16,
                pins=draw(st.sampled_from([0, 0, 0, 0, 1])),
                file_bytes=draw(st.integers(0, 5)),
            )._replace(namespace=draw(st.sampled_from([ONE, ONE, ONE, TWO])))
        )
    return forest(chunks)


@given(data=st.data(), chunks=forests())
@settings(max_examples=200, deadline=None)
def test_every_clause_of_the_rule(data, chunks):
    """The plan is the rule's own choice, in its order, to the last byte."""
    addresses = [chunk.address for chunk in chunks]
    busy = set(data.draw(st.lists(st.sampled_from(addresses), max_size=3)) if addresses else [])
    free_bytes = data.draw(st.integers(0, 40))
    used_before_s = data.draw(st.integers(0, 7))

    found = plan(chunks, busy=busy, free_bytes=free_bytes, used_before_s=used_before_s)

    gone, freed = by_the_book(chunks, busy=busy, free_bytes=free_bytes, used_before_s=used_before_s)
    assert [chunk.address for chunk in gone] == [(v.namespace, v.key) for v in found.victims]
    assert freed == found.file_bytes
    assert max(0, free_bytes - freed) == found.short_bytes
    assert not found.truncated


@given(data=st.data(), chunks=forests())
@settings(max_examples=200, deadline=None)
def test_no_child_outlives_its_parent(data, chunks):
    """After each step of a plan no stored chunk has lost a parent that was stored before."""
    addresses = [chunk.address for chunk in chunks]
    busy = set(data.draw(st.lists(st.sampled_from(addresses), max_size=3)) if addresses else [])
    found = plan(chunks, busy=busy, free_bytes=data.draw(st.integers(0, 60)))
    left = {chunk.address: chunk for chunk in chunks}
    for victim in found.victims:
        chunk = left.pop((victim.namespace, victim.key))
        assert not chunk.pins
        assert chunk.address not in busy
        assert not any((other.namespace, other.parent) == chunk.address for other in left.values())


@given(data=st.data(), chunks=forests())
@settings(max_examples=200, deadline=None)
def test_plans_add_up(data, chunks):
    """Short plans, carried out one after the other, remove what one long plan removes."""
    free_bytes = data.draw(st.integers(0, 60))
    whole = plan(chunks, free_bytes=free_bytes)
    left, victims, freed = chunks, [], 0
    while True:
        step = plan(left, free_bytes=max(0, free_bytes - freed), victims_max=2)
        victims += step.victims
        freed += step.file_bytes
        gone = {(victim.namespace, victim.key) for victim in step.victims}
        left = forest([chunk for chunk in left if chunk.address not in gone])
        if not step.truncated:
            break
    assert list(whole.victims) == victims


def test_leaf_first():
    """A chain that was used at one moment is eaten from its end."""
    chain = forest(
        [make(at, parent=at - 1 if at else None, used_s=5, end_token=16 * at) for at in range(4)]
    )
    assert ["3", "2"] == names(plan(chain, free_bytes=20))


def test_a_young_leaf_keeps_its_old_ancestors():
    """Old chunks under a young one stay, and a younger leaf elsewhere goes first."""
    chunks = forest(
        [
            make("root", used_s=1),
            make("leaf", parent="root", used_s=9),
            make("other", used_s=5),
        ]
    )
    assert ["other", "leaf", "root"] == names(plan(chunks, free_bytes=30))


def test_age_and_space():
    """What is too old goes whatever its size; the rest goes only for its bytes."""
    chunks = forest([make("old", used_s=1), make("mid", used_s=5), make("new", used_s=9)])
    assert ["old"] == names(plan(chunks, used_before_s=5))
    found = plan(chunks, used_before_s=5, free_bytes=15)
    assert ["old", "mid"] == names(found)
    assert [EvictionReason.AGE, EvictionReason.SPACE] == [v.reason for v in found.victims]


def test_nothing_asked_nothing_chosen():
    """Without a limit to meet the plan is empty."""
    assert [] == names(plan(forest([make("a")])))


def test_short_when_all_is_held():
    """Pins and transfers are kept even when that frees too little, and the plan says so."""
    chunks = forest([make("pinned", pins=1), make("busy"), make("free")])
    found = plan(chunks, busy={(ONE, key_of("busy"))}, free_bytes=25)
    assert ["free"] == names(found)
    assert found.short_bytes == 15
    assert not found.truncated


def test_unknown_sizes_free_nothing():
    """Chunks of unknown size go in their order and count for nothing."""
    chunks = forest([make("a", used_s=1, file_bytes=0), make("b", used_s=2)])
    found = plan(chunks, free_bytes=5)
    assert ["a", "b"] == names(found)
    assert found.file_bytes == 10


def test_a_long_plan_is_cut():
    """A plan ends at its limit and says that there is more."""
    found = plan(forest([make(at) for at in range(5)]), free_bytes=50, victims_max=3)
    assert len(found.victims) == 3
    assert found.truncated
    assert found.short_bytes == 20


def test_contradicting_counts_are_safe():
    """Where counts and parents disagree, nothing goes that anybody still counts."""
    chunks = [make("leaf", parent="root"), make("root", children=2, used_s=1)]
    assert ["leaf"] == names(plan(chunks, free_bytes=99))
    chunks = [make("leaf", parent="root"), make("root", children=0, used_s=1)]
    assert ["leaf"] == names(plan(chunks, free_bytes=99))


def deepest_first(chunk):
    """Order by depth alone."""
    return -chunk.end_token, 0, chunk.namespace, chunk.key


@given(data=st.data(), chunks=forests())
@settings(max_examples=100, deadline=None)
def test_another_order_keeps_the_other_clauses(data, chunks):
    """With an order of its own a plan takes no parent before its children, no pin, and no more."""
    free_bytes = data.draw(st.integers(0, 60))
    expected = by_the_book(
        chunks, busy=set(), free_bytes=free_bytes, used_before_s=-1, order=deepest_first
    )
    found = plan(sorted(chunks, key=deepest_first), order=deepest_first, free_bytes=free_bytes)
    assert [chunk.address for chunk in expected[0]] == [(v.namespace, v.key) for v in found.victims]
    assert expected[1] == found.file_bytes


def test_an_age_takes_the_order_of_recency():
    """Another order would stop at a young chunk and leave older ones behind it."""
    with pytest.raises(InvalidError, match="order of recency"):
        plan([], order=deepest_first, used_before_s=1)


@pytest.mark.parametrize("limit", ["free_bytes", "used_before_s", "victims_max"])
def test_negative_limits(limit):
    """A negative limit is a mistake of the caller."""
    with pytest.raises(InvalidError, match=limit):
        plan([], **{limit: -1})


def test_plans_are_frozen():
    """A dry run and an execution see the same plan."""
    found = plan(forest([make("a")]), free_bytes=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.victims = ()
    assert found == plan(forest([make("a")]), free_bytes=1)


def test_a_namespace_gives_what_it_has_to() -> None:
    """Its own chunks go for its own need, counted for the whole as well; the rest is found by age."""
    one, two = NamespaceId("1" * 32), NamespaceId("2" * 32)
    chunks = [
        Candidate(
            namespace=namespace,
            key=Key(bytes([at]) * 12),
            parent=None,
            file_bytes=10,
            used_s=at,
            end_token=16,
            children=0,
            pins=0,
        )
        for at, namespace in enumerate([one, one, one, two, two, two])
    ]

    def reasons(**limits: object) -> list[tuple[int, str]]:
        found = plan_eviction(chunks, find=lambda *_: None, **limits)
        return [(victim.used_s, str(victim.reason)) for victim in found.victims]

    assert reasons(free_by_namespace={two: 20}) == [(3, "namespace"), (4, "namespace")]
    assert reasons(free_bytes=20, free_by_namespace={two: 20}) == [
        (3, "namespace"),
        (4, "namespace"),
    ]
    assert reasons(free_bytes=30, free_by_namespace={two: 20}) == [
        (0, "space"),
        (3, "namespace"),
        (4, "namespace"),
    ]
    assert reasons(free_by_namespace={two: 10}, used_before_s=1) == [(0, "age"), (3, "namespace")]
    short = plan_eviction(
        chunks, find=lambda *_: None, free_bytes=50, free_by_namespace={two: 40, one: 10}
    )
    assert (len(short.victims), short.short_bytes) == (5, 10)


def test_what_a_namespace_cannot_give_is_found_elsewhere() -> None:
    """A pinned namespace above its own limit keeps nobody else's chunks, and the plan says what it owes."""
    chunks = forest(
        [make(at, used_s=at, pins=1) for at in range(4)]
        + [make(at, used_s=at)._replace(namespace=TWO) for at in range(4, 8)]
    )
    found = plan(chunks, free_bytes=25, free_by_namespace={ONE: 30})
    assert (names(found), found.short_bytes) == (["4", "5", "6"], 30)
    assert names(plan(chunks, free_by_namespace={ONE: 30})) == []
    cut = plan(chunks, free_bytes=40, free_by_namespace={ONE: 30}, victims_max=3)
    assert (names(cut), cut.truncated) == (["4", "5", "6"], True)


@given(data=st.data(), chunks=forests())
@settings(max_examples=300, deadline=None)
def test_limits_of_namespaces_neither_take_too_much_nor_too_little(data, chunks):
    """The whole and each namespace give what they have to or have nothing left, and nobody gives more."""
    addresses = [chunk.address for chunk in chunks]
    busy = set(data.draw(st.lists(st.sampled_from(addresses), max_size=3)) if addresses else [])
    free_bytes = data.draw(st.integers(0, 40))
    own = data.draw(st.dictionaries(st.sampled_from([ONE, TWO]), st.integers(0, 30)))
    used_before_s = data.draw(st.integers(0, 3))
    found = plan(
        chunks,
        busy=busy,
        free_bytes=free_bytes,
        free_by_namespace=own,
        used_before_s=used_before_s,
    )
    left = {chunk.address: chunk for chunk in chunks}
    needed, owed = free_bytes, dict(own)
    for victim in found.victims:
        gone = left.pop((victim.namespace, victim.key))
        assert not any((other.namespace, other.parent) == gone.address for other in left.values())
        wanted = owed.get(victim.namespace, 0)
        assert needed > 0 or wanted > 0 or victim.used_s < used_before_s
        needed = max(0, needed - victim.file_bytes)
        owed[victim.namespace] = max(0, wanted - victim.file_bytes)
    may_go, _ = by_the_book(list(left.values()), busy=busy, free_bytes=10**6, used_before_s=0)
    assert not needed or not may_go
    for namespace, wanted in owed.items():
        assert not wanted or all(chunk.namespace != namespace for chunk in may_go)
    assert found.short_bytes == max(needed, sum(owed.values()))
