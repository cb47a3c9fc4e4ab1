"""Eviction and pins: leaves first, least recently used first, and what must stay stays."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import Key
from prefixstore.store import PrefixStore, SkipReason
from prefixstore.testing.chains import (
    FIELDS,
    FILE_BYTES,
    chain,
    chunk_at,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]


def there(store: PrefixStore, keys: list[Key]) -> list[bool]:
    """Return for each key whether its blob lies in the tree, past every index."""
    assert store.namespace is not None
    return [Path(store.root.layout.blob(store.namespace, key)).exists() for key in keys]


def touches(disk: FaultyOs) -> int:
    """Count the touches of blobs; a writer touches its own file, too."""
    return sum(1 for call in disk.calls if call.name == "touch" and call.path.endswith(".kv"))


def test_eviction_eats_the_oldest_chain_from_its_end(open_store: OpenStore) -> None:
    """Half of the older chain goes, leaves first; the newer one stays whole."""
    clock = ManualClock()
    store, old, new = open_store(clock=clock), chain("old", 10), chain("new", 10)
    store_chain(store, old)
    clock.advance(100)
    store_chain(store, new)
    report = store.evict(15 * FILE_BYTES)

    assert there(store, old) == [True] * 5 + [False] * 5
    assert there(store, new) == [True] * 10
    assert (report.evicted_chunks, report.freed_bytes) == (5, 5 * FILE_BYTES)
    assert (report.left_chunks, report.left_bytes) == (15, 15 * FILE_BYTES)
    assert (store.longest_prefix(old), store.longest_prefix(new)) == (5, 10)


def test_a_dry_run_tells_and_changes_nothing(open_store: OpenStore) -> None:
    """The report is the one that the eviction then keeps to."""
    store, keys = open_store(), chain("a", 10)
    store_chain(store, keys)
    planned = store.evict(4 * FILE_BYTES, dry_run=True)

    assert there(store, keys) == [True] * 10
    done = store.evict(4 * FILE_BYTES)
    assert (planned.planned_chunks, planned.evicted_chunks, planned.left_chunks) == (6, 0, 4)
    assert (done.planned_chunks, done.evicted_chunks, done.left_chunks) == (6, 6, 4)


def test_a_touched_chain_outlives_an_untouched_one(open_store: OpenStore) -> None:
    """Recency is what the front door reports, not when a chunk was stored."""
    clock = ManualClock()
    store, first, second = open_store(clock=clock), chain("first", 5), chain("second", 5)
    store_chain(store, first)
    clock.advance(100)
    store_chain(store, second)
    clock.advance(100)
    store.touch(first)
    store.evict(5 * FILE_BYTES)

    assert there(store, first) == [True] * 5
    assert there(store, second) == [False] * 5


def test_touches_reach_other_hosts_through_the_disk(open_store: OpenStore) -> None:
    """A host with an index of its own sees what was used elsewhere by the times in the tree."""
    store, first, second = open_store(), chain("first", 5), chain("second", 5)
    store_chain(store, first)
    store_chain(store, second)
    store.work()
    for key in first + second:
        os.utime(store.root.layout.blob(store.namespace, key), (1, 1))
    store.close()
    toucher = open_store(index=None, config={"touch_interval_s": 0})
    toucher.reconcile()
    toucher.touch(first)
    toucher.work()
    elsewhere = open_store(index=None)
    elsewhere.evict(5 * FILE_BYTES)

    assert toucher.counters()["touches"] == 5
    assert there(elsewhere, first) == [True] * 5
    assert there(elsewhere, second) == [False] * 5


def test_touches_on_disk_are_sampled(open_store: OpenStore) -> None:
    """A hot chain costs one metadata write a blob and interval, however often it is used."""
    clock, keys = ManualClock(), chain("a", 5)
    disk = FaultyOs(RealOs())
    store = open_store(clock=clock, os_calls=disk, config={"touch_interval_s": 600})
    store_chain(store, keys)
    for _ in range(10):
        store.touch(keys)
        store.work()
    assert touches(disk) == 0, "a blob that was just written has the time of now"

    for _ in range(3):
        # A little more: the disk's own clock may have ticked while the chain was stored.
        clock.advance(610)
        store.touch(keys)
        store.touch(keys)
        store.work()
    assert touches(disk) == 15


def test_a_chunk_that_existed_is_due_for_a_touch(open_store: OpenStore) -> None:
    """Storing what is there already writes nothing, so its time on disk is still the old one."""
    keys = chain("a", 3)
    store_chain(open_store(), keys)
    disk = FaultyOs(RealOs())
    other = open_store(index=None, os_calls=disk)
    store_chain(other, keys)
    other.touch(keys)
    other.work()

    assert touches(disk) == 3


def test_age_evicts_whatever_the_size(open_store: OpenStore) -> None:
    """With an age alone nothing young goes."""
    clock = ManualClock()
    store, old, new = open_store(clock=clock), chain("old", 3), chain("new", 3)
    store_chain(store, old)
    clock.advance(1000)
    store_chain(store, new)
    report = store.evict(max_age_s=500)

    assert (there(store, old), there(store, new)) == ([False] * 3, [True] * 3)
    assert report.reasons == {"age": 3}


def test_eviction_needs_a_limit(open_store: OpenStore) -> None:
    """An eviction without any limit is a mistake, and one on a read-only store, too."""
    store = open_store()
    with pytest.raises(InvalidError, match="limit"):
        store.evict()
    readonly = open_store(config={"read_only": True})
    with pytest.raises(InvalidError, match="read-only"):
        readonly.evict(0)
    assert readonly.evict(0, dry_run=True).planned_chunks == 0


def test_eviction_sees_what_other_hosts_stored(open_store: OpenStore) -> None:
    """Blobs without a row are found first, so their parents have a child."""
    keys = chain("a", 6)
    one = open_store()
    store_chain(one, keys[:3])
    other = open_store(index=None)
    for at in range(3, 6):
        other.store(chunk_at(keys, at), payload_of(keys[at]))
    report = one.evict(4 * FILE_BYTES)

    assert there(one, keys) == [True] * 4 + [False] * 2
    assert report.evicted_chunks == 2


def test_eviction_counts_all_namespaces(open_store: OpenStore) -> None:
    """The quota is the root's: the least recently used goes, whoever stored it."""
    clock = ManualClock()
    old_model = open_store(namespace={**FIELDS, "model": "old"}, clock=clock)
    old = chain("a", 4)
    store_chain(old_model, old)
    store, new = open_store(clock=clock), chain("a", 4)
    store_chain(store, new)
    clock.advance(100)
    store.touch(new)
    store.evict(4 * FILE_BYTES)

    assert (there(old_model, old), there(store, new)) == ([False] * 4, [True] * 4)


def test_eviction_forgets_rows_without_blobs(open_store: OpenStore) -> None:
    """What another host evicted is not counted, nor evicted again."""
    store, keys = open_store(), chain("a", 6)
    store_chain(store, keys)
    for key in keys[3:]:
        Path(store.root.layout.blob(store.namespace, key)).unlink()
    report = store.evict(3 * FILE_BYTES)

    assert (report.planned_chunks, report.left_chunks) == (0, 3)


def test_chunks_in_flight_are_left(open_store: OpenStore) -> None:
    """A chunk that is being loaded, and the parent of one being stored, stay."""
    keys = chain("a", 4)
    seen = []

    class Evicting(FaultyOs):
        """Evicts everything in the middle of a load and of a store."""

        def read_into(self, fd: int, target: memoryview, offset: int) -> int:
            if armed and self._paths[fd].endswith(f"{keys[3].hex()}.kv") and not seen:
                seen.append(store.evict(0))
            return super().read_into(fd, target, offset)

    armed = False
    store = open_store(os_calls=Evicting(RealOs()))
    store_chain(store, keys)
    armed = True

    assert payload_of(keys[3]) == load(store, keys[3])
    assert there(store, keys) == [True] * 4, "its ancestors have a child, so they stay, too"
    assert seen[0].evicted_chunks == 0


def test_the_parent_of_a_chunk_that_is_being_stored_is_left(open_store: OpenStore) -> None:
    """Its child has no row yet, so the transfer has to count."""
    keys = chain("a", 2)
    seen = []

    class Evicting(FaultyOs):
        """Evicts everything just before the second chunk gets its name."""

        def link(self, source: str, target: str) -> None:
            if target.endswith(f"{keys[1].hex()}.kv"):
                seen.append(store.evict(0))
            super().link(source, target)

    store = open_store(os_calls=Evicting(RealOs()))
    store_chain(store, keys)

    assert seen[0].evicted_chunks == 0
    assert there(store, keys) == [True, True]


def test_a_chunk_that_cannot_be_removed_keeps_its_ancestors(open_store: OpenStore) -> None:
    """One refused unlink at the end of a chain, and the whole chain stays usable."""
    disk, keys = FaultyOs(RealOs()), chain("a", 4)
    store = open_store(os_calls=disk)
    store_chain(store, keys)
    disk.plan = When(
        fault=Fail(errno.EBUSY),
        name="unlink",
        matches=lambda call: call.path.endswith(f"{keys[3].hex()}.kv"),
    )
    report = store.evict(0)

    assert there(store, keys) == [True] * 4
    assert report.kept == {"error": 1, "has_children": 3}
    assert store.longest_prefix(keys) == 4


def test_a_chunk_that_is_used_after_the_plan_is_left(open_store: OpenStore) -> None:
    """Between plan and removal recency is looked at again, another process's on this host, too."""
    clock, keys = ManualClock(), chain("a", 2)
    looks: list[str] = []

    class Using(FaultyOs):
        """Uses the chunk once the plan is made: when the pins are looked at for the last time."""

        def scan(self, path: str):
            if path.endswith("/pins"):
                looks.append(path)
                if len(looks) == 4:
                    clock.advance(5)
                    neighbour.touch(keys)
                    neighbour.work()
            return super().scan(path)

    neighbour = open_store(clock=clock)
    store_chain(neighbour, keys)
    neighbour.work()
    store = open_store(clock=clock, os_calls=Using(RealOs()))
    report = store.evict(0)

    assert (report.planned_chunks, report.kept) == (2, {"used_meanwhile": 1, "has_children": 1})
    assert there(store, keys) == [True, True]


def test_a_failed_unlink_keeps_the_chunk_counted(open_store: OpenStore) -> None:
    """What cannot be removed is told, is still served and still counts."""
    disk, keys = FaultyOs(RealOs()), chain("a", 4)
    store = open_store(os_calls=disk)
    store_chain(store, keys)
    disk.plan = When(
        fault=Fail(errno.EACCES), name="unlink", matches=lambda call: call.path.endswith(".kv")
    )
    report = store.evict(0)

    assert (report.evicted_chunks, report.left_chunks) == (0, 4)
    assert "EACCES" in report.errors[0]
    assert [payload_of(key) for key in keys] == [load(store, key) for key in keys]
    disk.plan = ()
    assert store.evict(0).evicted_chunks == 4


def test_torn_files_of_a_power_cut_go_in_time(open_store: OpenStore) -> None:
    """An old empty file under a blob's name is removed; a fresh one may be another host's late view."""
    store, keys = open_store(), chain("a", 2)
    store_chain(store, keys)
    old, fresh = (Path(store.root.layout.blob(store.namespace, key)) for key in keys)
    for path in (old, fresh):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    store.evict(10**9)

    assert (old.exists(), fresh.exists()) == (False, True)


# Background eviction.


def test_stores_past_the_high_watermark_evict_to_the_low_one(open_store: OpenStore) -> None:
    """The root stays below its quota, and loads and stores go on meanwhile."""
    clock = ManualClock()
    store = open_store(clock=clock, config={"max_bytes": 20 * FILE_BYTES})
    for number in range(40):
        clock.advance(2)
        outcome = store_chain(store, chain(str(number), 1))[0]
        store.work()
        assert outcome.reason is None
        assert store.stats().file_bytes <= 20 * FILE_BYTES

    assert store.counters()["evictions"] >= 5
    assert 17 <= store.stats().chunks <= 20
    assert there(store, chain("39", 1)) == [True]


def test_a_full_quota_skips_stores_until_something_went(open_store: OpenStore) -> None:
    """What is pinned cannot go, so there is no room; loads go on."""
    clock, keys = ManualClock(), chain("a", 4)
    store = open_store(clock=clock, config={"max_bytes": 4 * FILE_BYTES})
    store.pin("all", keys)
    store_chain(store, keys)
    store.work()
    outcome = store_chain(store, chain("b", 1))[0]
    store.work()

    assert outcome.reason == SkipReason.QUOTA
    assert payload_of(keys[3]) == load(store, keys[3])
    store.unpin("all")
    clock.advance(31)
    store_chain(store, chain("b", 1))
    store.work()
    clock.advance(2)
    assert store_chain(store, chain("b", 1))[0].reason is None


def test_little_free_space_stops_stores_and_evicts(open_store: OpenStore) -> None:
    """The floor of free space sees what everyone else writes."""
    clock, keys, free = ManualClock(), chain("a", 10), [10**6]

    class Filling(FaultyOs):
        """A filesystem whose room the test decides."""

        def space(self, path: str):
            return super().space(path)._replace(free_bytes=free[0])

    store = open_store(
        os_calls=Filling(RealOs()), clock=clock, config={"min_free_bytes": 5 * FILE_BYTES}
    )
    store_chain(store, keys)
    clock.advance(2)
    free[0] = 2 * FILE_BYTES
    assert store_chain(store, chain("b", 1))[0].reason == SkipReason.LOW_SPACE

    store.work()
    assert 3 <= store.counters()["evicted"] <= 4
    free[0] = 6 * FILE_BYTES
    clock.advance(2)
    assert store_chain(store, chain("b", 1))[0].reason is None


def test_a_disk_that_is_full_to_the_last_byte_can_be_evicted_from(open_store: OpenStore) -> None:
    """``gc`` is what people run then: it must not need to write first. Ages need the server's clock."""
    disk, keys = FaultyOs(RealOs()), chain("a", 4)
    store_chain(open_store(), keys)
    store = open_store(namespace=None, os_calls=disk)
    disk.plan = When(fault=Fail(errno.ENOSPC), name="write_from", forever=True)
    report = store.evict(3 * FILE_BYTES, max_age_s=0)

    assert (report.evicted_chunks, report.left_chunks) == (1, 3)
    assert "ages are unknown" in report.errors[0]
    assert store.evict(0).evicted_chunks == 3


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_evicts_when_there_is_a_limit(open_store: OpenStore, error: int) -> None:
    """Full below the quota: others fill the disk, or its own quota is lower; give room back and go on."""
    disk, clock, keys = FaultyOs(RealOs()), ManualClock(), chain("a", 20)
    store = open_store(os_calls=disk, clock=clock, config={"max_bytes": 10**9})
    store_chain(store, keys)
    disk.plan = When(fault=Fail(error), name="write_from", forever=True)
    assert store_chain(store, chain("b", 1))[0].reason == SkipReason.FULL
    assert payload_of(keys[0]) == load(store, keys[0])
    disk.plan = ()
    store.work()

    assert store.counters()["evicted"] == 3
    assert store_chain(store, chain("b", 1))[0].reason is None, "freed room is used at once"


# Pins.


def test_pinned_chunks_and_their_ancestors_stay(open_store: OpenStore) -> None:
    """A pin at the end of a chain keeps the whole chain."""
    store, keys, other = open_store(), chain("a", 5), chain("b", 5)
    store_chain(store, keys)
    store_chain(store, other)
    store.pin("prompt", keys[2:3])
    report = store.evict(0)

    assert there(store, keys) == [True, True, True, False, False]
    assert there(store, other) == [False] * 5
    assert report.short_bytes == 3 * FILE_BYTES


def test_a_pin_waits_for_its_chunks(open_store: OpenStore) -> None:
    """A pin may be made before anything is stored, by any host."""
    keys = chain("a", 3)
    open_store(index=None).pin("prompt", keys)
    store = open_store()
    store_chain(store, keys)
    store.evict(0)

    assert there(store, keys) == [True] * 3


def test_a_pin_holds_until_its_end(open_store: OpenStore) -> None:
    """After its end it holds nothing, and its file goes with the next eviction."""
    clock = ManualClock()
    store, keys = open_store(clock=clock), chain("a", 3)
    store_chain(store, keys)
    now_s = store.pin("probe", keys).created_s
    store.unpin("probe")
    store.pin("short", keys, ends_at_s=now_s + 100)
    store.evict(0)
    assert there(store, keys) == [True] * 3

    clock.advance(101)
    store.evict(0)
    assert there(store, keys) == [False] * 3
    assert store.pins() == []


def test_pins_are_listed_and_replaced_by_name(open_store: OpenStore) -> None:
    """The last pin of a name counts."""
    store, keys = open_store(), chain("a", 3)
    store.pin("prompt", keys)
    store.pin("prompt", keys[:1])

    assert [("prompt", (keys[0],))] == [(pin.name, pin.keys) for pin in store.pins()]
    assert (store.unpin("prompt"), store.unpin("prompt")) == (True, False)


def test_a_damaged_pin_stops_eviction(open_store: OpenStore) -> None:
    """What a pin held is not guessed: nothing goes until it is mended, and the report names it."""
    store, keys = open_store(), chain("a", 3)
    store_chain(store, keys)
    store.pin("prompt", keys)
    Path(store.root.layout.pin("prompt")).write_text("{")
    report = store.evict(0)

    assert there(store, keys) == [True] * 3
    assert "prompt.json" in report.errors[0]


def test_a_pin_made_meanwhile_counts(open_store: OpenStore) -> None:
    """Between plan and removal the pin files are looked at again."""
    keys = chain("a", 3)
    store_chain(open_store(), keys)
    pinner = open_store(index=None)

    class Pinning(FaultyOs):
        """Pins the chain after the pins were read for the plan."""

        def scan(self, path: str):
            found = super().scan(path)
            if path.endswith("/pins"):
                looks.append(path)
                if len(looks) == 3:
                    pinner.pin("late", keys)
            return found

    looks: list[str] = []
    store = open_store(os_calls=Pinning(RealOs()))
    report = store.evict(0)

    assert there(store, keys) == [True] * 3
    assert report.kept == {"pinned": 3}


# Removal of single chunks.


def test_remove_takes_what_is_named_and_leaves_pins(open_store: OpenStore) -> None:
    """Single chunks go at once, pinned and absent ones are told."""
    store, keys = open_store(), chain("a", 4)
    store_chain(store, keys)
    store.pin("prompt", keys[:1])
    report = store.remove([keys[0], keys[3], chain("b", 1)[0]])

    assert there(store, keys) == [True, True, True, False]
    assert (report.kept, report.evicted_chunks) == ({"pinned": 1, "absent": 1}, 1)
    assert store.longest_prefix(keys) == 3


def test_remove_works_on_a_store_without_a_namespace(open_store: OpenStore) -> None:
    """Maintenance names the namespace."""
    store, keys = open_store(), chain("a", 2)
    store_chain(store, keys)
    rootwide = open_store(namespace=None)
    with pytest.raises(InvalidError, match="namespace"):
        rootwide.remove(keys)
    rootwide.remove(keys[1:], namespace=store.namespace)

    assert there(store, keys) == [True, False]


def test_the_root_gone_under_an_eviction_is_told(open_store: OpenStore) -> None:
    """A mount that fails in the middle ends the eviction with a sentence, not an exception."""
    disk, keys = FaultyOs(RealOs()), chain("a", 3)
    store = open_store(os_calls=disk)
    store_chain(store, keys)
    disk.plan = When(fault=Fail(errno.ENOTCONN), forever=True)
    report = store.evict(0)

    assert report.evicted_chunks == 0
    assert "ENOTCONN" in report.errors[0]
    with pytest.raises(UnavailableError):
        store.pin("prompt", keys)
