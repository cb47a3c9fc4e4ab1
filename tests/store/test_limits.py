"""Limits that lie in the root: every store obeys them, the tighter of root and settings holds."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import NamespaceId
from prefixstore.store import PrefixStore, SkipReason
from prefixstore.store.collector import LOOK_S as COLLECTOR_LOOK_S
from prefixstore.store.collector import PASS_S, QUIET_S
from prefixstore.store.limits import LOOK_S
from prefixstore.testing.chains import (
    FIELDS,
    FILE_BYTES,
    chain,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Fail, FaultyOs, Hang, When
from prefixstore.tree.limits import LimitsDocument, read_limits, remove_limits, write_limits
from prefixstore.tree.osfs import RealOs
from prefixstore.tree.root import Root

OpenStore = Callable[..., PrefixStore]


def blobs(root: str, namespace: NamespaceId | None = None) -> int:
    """Count the blobs in the tree, past every index."""
    return sum(1 for _ in Path(root).glob(f"ns/{namespace or '*'}/*/*/*.kv"))


def set_limits(root: str, **limits: object) -> None:
    """Give the root its limits."""
    write_limits(Root.create(root), LimitsDocument(**limits))


def test_limits_of_the_root_bind_every_store(open_store: OpenStore, root: str) -> None:
    """Without a word in its settings a store evicts by the root's quota."""
    set_limits(root, max_bytes=20 * FILE_BYTES)
    clock = ManualClock()
    stores = [open_store(clock=clock, index=None) for _ in range(2)]
    for each in stores:
        each.work()
    for number in range(60):
        clock.advance(2)
        store_chain(stores[number % 2], chain(str(number), 1))
        for each in stores:
            each.work()
        assert blobs(root) <= 20
    assert blobs(root) >= 16


@pytest.mark.parametrize(("of_root", "own", "kept"), [(10, 20, 10), (20, 10, 10)])
def test_the_tighter_limit_holds(
    open_store: OpenStore, root: str, of_root: int, own: int, kept: int
) -> None:
    """Neither the root's limit nor the store's own is ever exceeded."""
    set_limits(root, max_bytes=of_root * FILE_BYTES)
    store = open_store(config={"max_bytes": own * FILE_BYTES}, index=None)
    reasons = [outcome.reason for outcome in store_chain(store, chain("a", 30))]
    assert (blobs(root), reasons[-1]) == (kept, SkipReason.QUOTA)


def test_an_open_store_follows_a_change(open_store: OpenStore, root: str) -> None:
    """Within some seconds, and without being opened again."""
    clock = ManualClock()
    store = open_store(clock=clock, index=None)
    store_chain(store, chain("a", 10))
    assert not store.limits().any
    set_limits(root, max_bytes=5 * FILE_BYTES)
    clock.advance(LOOK_S)
    assert store.limits().max_bytes == 5 * FILE_BYTES
    assert store_chain(store, chain("b", 1))[0].reason is SkipReason.QUOTA
    store.work()
    assert blobs(root) == 4
    assert remove_limits(store.root)
    clock.advance(LOOK_S)
    assert not store.limits().any


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"max_chunks": 5}', '{"max_bytes": 0}'])
def test_limits_that_are_not_understood_stop_stores_only(
    open_store: OpenStore, root: str, content: str
) -> None:
    """What cannot be kept is not exceeded: nothing is stored or evicted, loads go on, the file is named."""
    clock, keys = ManualClock(), chain("a", 3)
    store = open_store(clock=clock, index=None)
    store_chain(store, keys)
    (Path(root) / "limits.json").write_text(content)
    clock.advance(LOOK_S)
    (skipped,) = store_chain(store, chain("b", 1))
    assert skipped.reason is SkipReason.LIMITS
    assert "limits.json" in skipped.detail
    assert load(store, keys[0]) == payload_of(keys[0])
    with pytest.raises(InvalidError, match=r"limits\.json"):
        store.evict()

    (Path(root) / "limits.json").unlink()
    clock.advance(LOOK_S)
    assert store_chain(store, chain("b", 1))[0].published


def of_limits(call: Call) -> bool:
    """Whether a call is on the root's limits."""
    return call.path.endswith("limits.json")


@pytest.mark.parametrize("name", ["stat", "open", "read_into"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_limits_that_were_never_read_stop_stores_only(
    open_store: OpenStore, root: str, name: str, error: int
) -> None:
    """They are no less kept for a mode that some umask gave them; path and error are told, loads go on."""
    set_limits(root, max_bytes=4 * FILE_BYTES)
    clock, keys = ManualClock(), chain("a", 5)
    store_chain(open_store(clock=clock, index=None), keys[:3])
    calls = FaultyOs(RealOs(), When(fault=Fail(error), name=name, matches=of_limits, forever=True))
    store = open_store(clock=clock, os_calls=calls, index=None)
    for _ in range(3):
        clock.advance(LOOK_S)
        (skipped,) = store_chain(store, chain("b", 1))
        assert skipped.reason is SkipReason.LIMITS
        assert f"{root}/limits.json" in skipped.detail
        assert errno.errorcode[error] in skipped.detail
    assert load(store, keys[0]) == payload_of(keys[0])
    with pytest.raises(UnavailableError, match=r"limits\.json"):
        store.evict()
    assert store.evict(3 * FILE_BYTES).left_chunks == 3

    calls.reset()
    clock.advance(LOOK_S)
    store.reconcile()
    reasons = [outcome.reason for outcome in store_chain(store, keys[3:])]
    assert reasons == [None, SkipReason.QUOTA]


def test_a_change_that_cannot_be_read_is_not_passed_over(open_store: OpenStore, root: str) -> None:
    """Neither where there were no limits before, nor where there were others; the old ones come back sound."""
    clock = ManualClock()
    calls = FaultyOs(RealOs())
    store = open_store(clock=clock, os_calls=calls, index=None)
    limits, kept = Path(root) / "limits.json", Path(root) / "kept"
    unreadable = When(fault=Fail(errno.EACCES), name="open", matches=of_limits, forever=True)
    for max_bytes in (9 * FILE_BYTES, 8 * FILE_BYTES):
        assert store_chain(store, chain("a", 1))[0].reason is None
        set_limits(root, max_bytes=max_bytes)
        calls.reset(unreadable)
        clock.advance(LOOK_S)
        assert store_chain(store, chain("b", 1))[0].reason is SkipReason.LIMITS
        calls.reset()
        clock.advance(LOOK_S)
        assert store.limits().max_bytes == max_bytes

    limits.rename(kept)
    limits.write_text("{")
    clock.advance(LOOK_S)
    assert store_chain(store, chain("b", 1))[0].reason is SkipReason.LIMITS
    kept.rename(limits)
    clock.advance(LOOK_S)
    assert store_chain(store, chain("b", 1))[0].reason is None


def test_a_root_that_goes_away_keeps_its_limits(open_store: OpenStore, root: str) -> None:
    """Whether its mount fails or leaves an empty directory behind; one that had none gets none."""
    clock = ManualClock()
    calls = FaultyOs(RealOs())
    store = open_store(clock=clock, os_calls=calls, index=None)
    assert not store.limits().any
    failing = When(fault=Fail(errno.ENOTCONN), name="stat", matches=of_limits, forever=True)
    calls.reset(failing)
    clock.advance(LOOK_S)
    assert not store.limits().any

    calls.reset()
    set_limits(root, max_bytes=9 * FILE_BYTES)
    clock.advance(LOOK_S)
    assert store.limits().max_bytes == 9 * FILE_BYTES
    calls.reset(failing)
    clock.advance(LOOK_S)
    assert store.limits().max_bytes == 9 * FILE_BYTES
    calls.reset()
    Path(root).rename(f"{root}-away")
    Path(root).mkdir()
    clock.advance(LOOK_S)
    assert store.limits().max_bytes == 9 * FILE_BYTES
    Path(root).rmdir()
    Path(f"{root}-away").rename(root)


def test_nobody_takes_limits_that_are_being_read_for_none(open_store: OpenStore, root: str) -> None:
    """Who asks while the first look hangs looks by itself."""
    set_limits(root, max_bytes=9 * FILE_BYTES)
    gate = threading.Event()
    calls = FaultyOs(RealOs())
    store = open_store(clock=ManualClock(), namespace=None, os_calls=calls, index=None)
    calls.reset([When(fault=Hang(gate), nth=1, name="stat", matches=of_limits)])
    first = threading.Thread(target=store.limits)
    first.start()
    while not calls.calls:
        first.join(0.01)
    try:
        assert store.limits().max_bytes == 9 * FILE_BYTES
    finally:
        gate.set()
        first.join()


def test_a_namespace_that_cannot_give_costs_nobody_else_a_chunk_too_many(
    open_store: OpenStore, root: str
) -> None:
    """Pinned above its own limit: the root is evicted from all the same, and not at every look."""
    clock, pinned = ManualClock(), chain("pinned", 60)
    other = open_store(namespace={**FIELDS, "model": "old"}, clock=clock, index=None)
    store_chain(other, pinned)
    other.work()
    other.pin("documents", pinned)
    store = open_store(clock=clock, index=None)
    assert other.namespace is not None
    set_limits(root, max_bytes=100 * FILE_BYTES, namespaces={other.namespace: 20 * FILE_BYTES})
    reasons = []
    for number in range(200):
        clock.advance(COLLECTOR_LOOK_S)
        reasons += [outcome.reason for outcome in store_chain(store, chain(str(number), 1))]
        store_chain(other, chain(f"x{number}", 1))
        store._collector.look()
        store.work()
    assert reasons == [None] * 200
    assert (blobs(root, other.namespace), blobs(root) <= 95) == (60, True)
    assert 2 <= store.counters()["evictions"] <= 200 * COLLECTOR_LOOK_S / QUIET_S + 1


def test_a_namespace_keeps_to_its_own_limit(open_store: OpenStore, root: str) -> None:
    """It alone gives, whoever is older; the others keep what they have."""
    clock = ManualClock()
    other = open_store(namespace={**FIELDS, "model": "old"}, clock=clock, index=None)
    store_chain(other, chain("a", 10))
    clock.advance(1000)
    store = open_store(clock=clock, index=None)
    assert store.namespace is not None
    set_limits(root, namespaces={store.namespace: 10 * FILE_BYTES})
    clock.advance(LOOK_S)
    for number in range(30):
        clock.advance(2)
        store_chain(store, chain(str(number), 1))
        store.work()
        assert blobs(root, store.namespace) <= 10
    assert blobs(root, store.namespace) >= 8
    assert (blobs(root, other.namespace), store.counters().get("evicted", 0) >= 20) == (10, True)


def test_a_plan_says_which_limit_asked(open_store: OpenStore, root: str) -> None:
    """What a namespace has to give counts for the whole root, too: no more goes than has to."""
    clock = ManualClock()
    other = open_store(namespace={**FIELDS, "model": "old"}, clock=clock, index=None)
    store_chain(other, chain("a", 20))
    clock.advance(1000)
    store = open_store(clock=clock, index=None)
    store_chain(store, chain("b", 20))
    assert store.namespace is not None
    set_limits(root, max_bytes=40 * FILE_BYTES, namespaces={store.namespace: 20 * FILE_BYTES})
    clock.advance(LOOK_S)
    plan = store.evict(dry_run=True)
    assert plan.reasons == {"namespace": 3, "space": 3}
    done = store.evict()
    assert (done.reasons, done.evicted_chunks) == (plan.reasons, 6)
    assert (blobs(root, other.namespace), blobs(root, store.namespace)) == (17, 17)


def test_what_is_too_old_goes_though_nobody_stores(open_store: OpenStore, root: str) -> None:
    """One host makes a pass now and then; the others see that it did."""
    set_limits(root, max_age_s=3 * PASS_S)
    clock, keys = ManualClock(), chain("a", 4)
    stores = [open_store(clock=clock, index=None) for _ in range(2)]
    store_chain(stores[0], keys)
    for each in stores:
        each.work()
    for _ in range(8):
        clock.advance(PASS_S / 2)
        for each in stores:
            each._collector.look()
            each.work()
    passes = sum(each.counters().get("evictions", 0) for each in stores)
    assert blobs(root) == 0
    assert 3 <= passes <= 5


def test_nothing_is_above_the_high_watermark_for_long(open_store: OpenStore, root: str) -> None:
    """Also where stores have ended: the collector looks by itself."""
    clock = ManualClock()
    store = open_store(clock=clock, index=None)
    store_chain(store, chain("a", 20))
    store.work()
    set_limits(root, max_bytes=20 * FILE_BYTES)
    clock.advance(LOOK_S)
    store._collector.look()
    store.work()
    assert blobs(root) == 17


def test_a_pass_takes_no_more_than_the_limits_say(open_store: OpenStore, root: str) -> None:
    """Below the high watermark a pass of the collector removes nothing; another's lease is respected."""
    set_limits(root, max_bytes=20 * FILE_BYTES)
    clock = ManualClock()
    store, other = open_store(clock=clock, index=None), open_store(clock=clock, index=None)
    store_chain(store, chain("a", 18))
    report = store.collect()
    assert report is not None
    assert (report.evicted_chunks, blobs(root)) == (0, 18)
    assert other._collector._lease.acquire()
    assert store.collect() is None
    other._collector._lease.release()
    store_chain(store, chain("b", 2))
    report = store.collect()
    assert report is not None
    assert (report.evicted_chunks, blobs(root)) == (3, 17)


def test_limits_read_back_as_written(root: str) -> None:
    """Every field survives; a root without limits has none."""
    opened = Root.create(root)
    assert read_limits(opened) is None
    document = LimitsDocument(
        max_bytes=7, min_free_bytes=8, max_age_s=9.5, namespaces={"a" * 32: 10}
    )
    write_limits(opened, document)
    assert read_limits(opened) == document
    write_limits(opened, LimitsDocument(namespaces={"../x": 10}))
    with pytest.raises(InvalidError, match="ids of namespaces"):
        read_limits(opened)
