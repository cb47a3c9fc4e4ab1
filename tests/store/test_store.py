"""PrefixStore as its callers see it: what is stored is found and loaded, and nothing else is."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from prefixstore.errors import ClosedError, InvalidError, UnavailableError
from prefixstore.keys import Key
from prefixstore.store import Chunk, Loaded, PrefixStore, SkipReason
from prefixstore.testing.chains import (
    FIELDS,
    RAW_BYTES,
    chain,
    chunk_at,
    load,
    payload_of,
    store_chain,
)
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import RealOs
from prefixstore.tree.writers import this_process

OpenStore = Callable[..., PrefixStore]


def blob_path(store: PrefixStore, key: Key) -> Path:
    """Return where a chunk's blob lies."""
    assert store.namespace is not None
    return Path(store.root.layout.blob(store.namespace, key))


# Storing, finding, loading.


def test_what_was_stored_is_found_and_loaded(open_store: OpenStore) -> None:
    """Every chunk of a chain comes back with its own bytes."""
    store, keys = open_store(), chain("a", 20)
    outcomes = store_chain(store, keys)

    assert [outcome.existed for outcome in outcomes] == [False] * 20
    assert [payload_of(key) for key in keys] == [load(store, key) for key in keys]
    assert store.longest_prefix(keys) == 20
    assert store.contains(keys) == [True] * 20


def test_what_was_not_stored_is_a_miss(open_store: OpenStore) -> None:
    """An empty store misses everything, by value."""
    store, keys = open_store(), chain("a", 3)

    assert load(store, keys[0]) == "absent"
    assert store.longest_prefix(keys) == 0
    assert store.contains(keys) == [False] * 3


def test_a_chunk_tells_its_place_when_loaded(open_store: OpenStore) -> None:
    """Parent and depth travel with the blob."""
    store, keys = open_store(), chain("a", 2)
    store_chain(store, keys)
    found = store.load(keys[1], bytearray(RAW_BYTES), raw_bytes=RAW_BYTES)

    assert isinstance(found, Loaded)
    assert (keys[0], 32, RAW_BYTES) == (found.parent, found.end_token, found.raw_bytes)


def test_storing_again_leaves_the_first_bytes(open_store: OpenStore) -> None:
    """The first writer of a key wins: two hosts may compute different bytes, both valid."""
    store, keys = open_store(), chain("a", 1)
    store_chain(store, keys)
    second = store.store(chunk_at(keys, 0), bytes(RAW_BYTES))

    assert second.existed
    assert second.published
    assert payload_of(keys[0]) == load(store, keys[0])


def test_buffers_take_part_without_a_copy(open_store: OpenStore) -> None:
    """A tree buffer is stored from and loaded into."""
    store, keys = open_store(), chain("a", 1)
    buffer = Buffer.allocate(2 * RAW_BYTES)
    buffer.payload(RAW_BYTES)[:] = payload_of(keys[0])
    store.store(chunk_at(keys, 0), buffer, raw_bytes=RAW_BYTES)
    buffer.payload(RAW_BYTES)[:] = bytes(RAW_BYTES)
    store.load(keys[0], buffer, raw_bytes=RAW_BYTES)

    assert payload_of(keys[0]) == bytes(buffer.payload(RAW_BYTES))


@pytest.mark.parametrize("codec", ["auto", "raw", "zstd", "shuffle+zstd"])
def test_every_codec_gives_back_the_same_bytes(open_store: OpenStore, codec: str) -> None:
    """What compresses is stored smaller and loads the same."""
    store, keys = open_store(config={"codec": codec}), chain("a", 1)
    compressible = bytes(range(100)) * 1000
    outcome = store.store(chunk_at(keys, 0), compressible)
    out = bytearray(len(compressible))
    store.load(keys[0], out, raw_bytes=len(out))

    assert compressible == bytes(out)
    assert (codec == "raw") == (outcome.stored_bytes == len(compressible))
    assert len(compressible) - outcome.stored_bytes == store.counters()["compression_saved_bytes"]


def test_namespaces_do_not_see_each_other(open_store: OpenStore) -> None:
    """The same key in another namespace is another chunk."""
    one, other = open_store(), open_store(namespace={**FIELDS, "dtype": "float16"})
    keys = chain("a", 1)
    store_chain(one, keys)

    assert load(other, keys[0]) == "absent"
    assert other.longest_prefix(keys) == 0


def test_a_chunk_of_another_size_is_a_miss_and_stays(open_store: OpenStore) -> None:
    """A caller with a wrong size does not take the blob away from the others."""
    store, keys = open_store(), chain("a", 1)
    store_chain(store, keys)
    wrong = store.load(keys[0], bytearray(RAW_BYTES), raw_bytes=RAW_BYTES - 1)

    assert wrong.reason == "size"
    assert payload_of(keys[0]) == load(store, keys[0])


# Knowledge across stores and restarts.


def test_a_second_store_finds_what_the_first_published(open_store: OpenStore) -> None:
    """Another engine, with an index that knows nothing, finds a chain by probing."""
    keys = chain("a", 300)
    store_chain(open_store(), keys)
    other = open_store(index=None)

    assert other.longest_prefix(keys) == 300
    assert other.counters()["probes"] <= 20
    assert payload_of(keys[299]) == load(other, keys[299])


def test_found_chunks_are_known_afterwards(open_store: OpenStore) -> None:
    """What probing found goes into the index, so the next lookup does not probe again."""
    clock, keys = ManualClock(), chain("a", 300)
    store_chain(open_store(), keys)
    other = open_store(index=None, clock=clock)
    other.longest_prefix(keys)
    other.work()
    probes = other.counters()["probes"]
    clock.advance(60)

    assert other.longest_prefix(keys) == 300
    assert probes + 1 == other.counters()["probes"], "only the end of the chain is looked at"


def test_misses_are_remembered_for_their_time(open_store: OpenStore) -> None:
    """A missing key is probed once, and again when its time is over."""
    clock, keys = ManualClock(), chain("a", 1)
    reader = open_store(index=None, clock=clock, config={"miss_ttl_s": 5})
    for _ in range(3):
        reader.longest_prefix(keys)
    assert reader.counters()["probes"] == 1

    store_chain(open_store(), keys)
    assert reader.longest_prefix(keys) == 0
    clock.advance(5)
    assert reader.longest_prefix(keys) == 1


def test_a_stored_chunk_is_found_though_it_was_missed_before(open_store: OpenStore) -> None:
    """Publishing ends the memory of a miss."""
    clock, keys = ManualClock(), chain("a", 2)
    store = open_store(config={"miss_ttl_s": 1000}, clock=clock)
    store.longest_prefix(keys)
    store_chain(store, keys)
    assert store.longest_prefix(keys) == 2

    clock.advance(10)
    assert store.longest_prefix(keys) == 2, "before the index has heard of it, too"


def test_a_chain_that_another_host_shortened_is_found_shorter(open_store: OpenStore) -> None:
    """Eviction elsewhere takes a chain's end; one look at the end tells."""
    clock, keys = ManualClock(), chain("a", 100)
    store = open_store(clock=clock)
    store_chain(store, keys)
    for key in keys[60:]:
        blob_path(store, key).unlink()
    clock.advance(60)

    assert store.longest_prefix(keys) == 60
    assert store.longest_prefix(keys) == 60


def test_a_vanished_blob_is_a_miss_and_forgotten(open_store: OpenStore) -> None:
    """A row without a blob promises once, not twice."""
    clock, keys = ManualClock(), chain("a", 1)
    store = open_store(clock=clock)
    store_chain(store, keys)
    store.work()
    blob_path(store, keys[0]).unlink()

    assert load(store, keys[0]) == "absent"
    assert store.contains(keys) == [False]
    assert store.stats().chunks == 0


def test_a_reopened_store_knows_what_it_knew(open_store: OpenStore) -> None:
    """The index outlives the process: a restart finds a chain without probing."""
    clock, keys = ManualClock(), chain("a", 50)
    with open_store() as store:
        store_chain(store, keys)
    again = open_store(clock=clock)

    assert again.longest_prefix(keys) == 50
    assert again.counters()["probes"] == 1


def test_a_fresh_index_is_rebuilt_in_the_background(open_store: OpenStore) -> None:
    """Losing the index loses nothing: it is built anew while the store serves."""
    keys = chain("a", 50)
    store_chain(open_store(index=None), keys)
    store = open_store(background=True)

    assert store.wait_idle(30)
    assert (store.stats().chunks, store.stats().complete) == (50, True)
    assert store.contains(keys) == [True] * 50
    assert "probes" not in store.counters()


def test_a_first_scan_goes_on_where_it_was_cut_short(open_store: OpenStore) -> None:
    """A host that restarts in the middle of it does not begin anew, and misses nothing in the end."""
    keys = [Key(bytes([at]) + key[1:]) for at, key in enumerate(chain("a", 250))]
    store_chain(open_store(index=None), keys)
    calls = FaultyOs(RealOs())
    for cut_after in (100, 150):
        seen = iter(range(cut_after))
        cut = open_store(os_calls=calls)
        report = cut._evictor.reconcile(
            stop=lambda seen=seen: next(seen, None) is None, resume=True
        )
        assert not report.finished
        assert not cut.stats().complete
        cut.close()
    calls.reset()
    store = open_store(os_calls=calls)
    store.work()

    read = {call.path for call in calls.calls if call.name == "stat" and call.path.endswith(".kv")}
    # Cut after 100, noted at 64; from there cut after 150 more, noted at 64 + 128.
    assert len(read) == 250 - (64 + 128)
    assert (store.stats().chunks, store.stats().complete) == (250, True)
    assert store.contains(keys) == [True] * 250
    assert store.reconcile().blobs == 250, "a scan that is asked for begins at the start"


def test_a_failing_index_is_replaced_and_nothing_is_raised(open_store: OpenStore) -> None:
    """The hint may break at any time; the store goes on without it."""
    keys = chain("a", 3)
    store = open_store()
    store_chain(store, keys)
    broken = store.hints._index

    def fail(*_arguments: object, **_named: object) -> None:
        raise UnavailableError(errno.EIO, "the index is gone")

    for name in ("get_many", "known_prefix", "put_many", "remove_many", "touch_many", "totals"):
        setattr(broken, name, fail)

    assert store.longest_prefix(keys) == 3
    assert payload_of(keys[1]) == load(store, keys[1])
    store.touch(keys)
    store_chain(store, chain("b", 2))
    store.work()
    assert (store.stats().index_kind, store.counters()["index_failures"]) == ("MemoryIndex", 1)


# Damage.


def flip(path: Path, *, at: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("at", "reason"), [(20, "header"), (100, "header"), (4096 + 17, "digest")])
def test_damage_is_a_miss_and_goes_to_quarantine(
    open_store: OpenStore, at: int, reason: str
) -> None:
    """A flipped bit is never served; the blob moves away and the chunk can be stored again."""
    store, keys = open_store(), chain("a", 1)
    store_chain(store, keys)
    flip(blob_path(store, keys[0]), at=at)

    assert reason == load(store, keys[0])
    assert store.counters()["quarantined"] == 1
    assert [f"{reason}."] == [
        path.name[: len(reason) + 1] for path in Path(store.root.layout.quarantine).iterdir()
    ]
    assert not store_chain(store, keys)[0].existed
    assert payload_of(keys[0]) == load(store, keys[0])


def test_damage_seen_once_is_read_again(open_store: OpenStore) -> None:
    """A client's bad cache page is no reason to take a sound blob from everyone."""
    store, keys = open_store(), chain("a", 1)
    store_chain(store, keys)
    flip(blob_path(store, keys[0]), at=5000)
    reads = []

    class Healing(FaultyOs):
        """The file is sound again when it is opened for the second time."""

        def open(self, path: str, flags: int, mode: int = 0o666) -> int:
            if path.endswith(".kv"):
                reads.append(path)
                if len(reads) == 2:
                    flip(Path(path), at=5000)
            return super().open(path, flags, mode)

    healed = open_store(os_calls=Healing(RealOs()))

    assert payload_of(keys[0]) == load(healed, keys[0])
    assert len(reads) == 2
    assert "quarantined" not in healed.counters()


def test_a_host_that_finds_too_much_damage_stops_taking_blobs_away(open_store: OpenStore) -> None:
    """Bad memory on one host must not empty the root for all others."""
    store, keys = open_store(), chain("a", 20)
    store_chain(store, keys)
    for key in keys:
        flip(blob_path(store, key), at=5000)

    assert [load(store, key) for key in keys] == ["digest"] * 20
    assert (store.counters()["quarantined"], store.counters()["quarantine_refused"]) == (16, 4)


def test_a_read_only_store_takes_nothing_away(open_store: OpenStore) -> None:
    """Who only serves leaves damage to others."""
    keys = chain("a", 1)
    store_chain(open_store(), keys)
    store = open_store(config={"read_only": True})
    flip(blob_path(store, keys[0]), at=5000)

    assert load(store, keys[0]) == "digest"
    assert blob_path(store, keys[0]).exists()


# Trouble with the filesystem.


def test_a_root_that_cannot_be_read_is_a_miss(open_store: OpenStore) -> None:
    """An I/O error misses, and the row stays: the blob may well be there."""
    keys = chain("a", 1)
    store_chain(open_store(), keys)
    disk = FaultyOs(RealOs())
    store = open_store(os_calls=disk)
    store.reconcile()
    disk.plan = When(fault=Fail(errno.EIO), name="read_into")

    assert load(store, keys[0]) == "io"
    assert store.contains(keys) == [True]


def test_lookups_survive_a_root_that_does_not_answer(open_store: OpenStore) -> None:
    """What cannot be probed is missing for now, and is not remembered as missing."""
    keys = chain("a", 3)
    store_chain(open_store(), keys)
    disk = FaultyOs(RealOs())
    store = open_store(index=None, os_calls=disk)
    disk.plan = When(fault=Fail(errno.EIO), name="stat")
    assert store.longest_prefix(keys) == 0

    disk.plan = ()
    assert store.longest_prefix(keys) == 3


def test_a_root_that_does_not_answer_costs_no_knowledge(open_store: OpenStore) -> None:
    """One failed stat ends the lookup; what the index knew it still knows afterwards."""
    clock, keys = ManualClock(), chain("a", 50)
    disk = FaultyOs(RealOs())
    store = open_store(os_calls=disk, clock=clock)
    store_chain(store, keys)
    store.work()
    clock.advance(60)
    disk.plan = When(fault=Fail(errno.EIO), name="stat", forever=True)
    assert (store.longest_prefix(keys), store.contains(chain("b", 9))) == (0, [False] * 9)
    assert store.counters()["probes_failed"] == 2

    disk.plan = ()
    probes = store.counters()["probes"]
    assert store.longest_prefix(keys) == 50
    assert store.counters()["probes"] == probes + 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "unavailable")],
)
def test_failed_stores_pause_and_resume(open_store: OpenStore, error: int, reason: str) -> None:
    """A disk that is full costs one failed write a pause; loads go on; freed room is used again."""
    clock, keys, more = ManualClock(), chain("a", 1), chain("b", 4)
    store_chain(open_store(), keys)
    disk = FaultyOs(RealOs())
    store = open_store(os_calls=disk, clock=clock)
    disk.plan = When(fault=Fail(error), name="write_from", forever=True)

    outcomes = store_chain(store, more)
    assert [reason, "paused", "paused", "paused"] == [outcome.reason for outcome in outcomes]
    assert outcomes[0].detail != ""
    assert payload_of(keys[0]) == load(store, keys[0])

    disk.plan = ()
    assert store.store(chunk_at(more, 0), payload_of(more[0])).reason == "paused"
    clock.advance(1)
    assert [outcome.reason for outcome in store_chain(store, more)] == [None] * 4


def test_a_chunk_that_exists_does_not_end_a_pause(open_store: OpenStore) -> None:
    """That a chunk is there says nothing about whether the disk takes another."""
    clock, keys, more = ManualClock(), chain("a", 1), chain("b", 2)
    disk = FaultyOs(RealOs())
    store = open_store(os_calls=disk, clock=clock)
    store_chain(store, keys)
    disk.plan = When(fault=Fail(errno.ENOSPC), name="write_from", forever=True)
    assert store_chain(store, more)[0].reason == "full"
    clock.advance(1)

    assert store_chain(store, keys)[0].existed
    assert [outcome.reason for outcome in store_chain(store, more)] == ["paused", "paused"]


def test_a_read_only_store_skips_stores(open_store: OpenStore) -> None:
    """It serves and writes nothing under the root."""
    keys = chain("a", 2)
    store_chain(open_store(), keys[:1])
    calls = FaultyOs(RealOs())
    store = open_store(config={"read_only": True}, os_calls=calls)

    assert [outcome.reason for outcome in store_chain(store, keys)] == [SkipReason.READ_ONLY] * 2
    assert payload_of(keys[0]) == load(store, keys[0])
    store.touch(keys)
    store.work()
    store.close()
    writes = {"write_from", "link", "rename", "unlink", "make_directory", "touch", "set_mode"}
    assert not writes & {call.name for call in calls.calls}


# Misuse and ends.


def test_misuse_is_told_at_once(open_store: OpenStore) -> None:
    """Wrong sizes, missing namespaces and closed stores are errors of the caller."""
    store, keys = open_store(), chain("a", 1)
    with pytest.raises(InvalidError, match="6000"):
        store.load(keys[0], bytearray(10), raw_bytes=RAW_BYTES)
    with pytest.raises(InvalidError, match="0 bytes"):
        store.store(chunk_at(keys, 0), b"")
    with pytest.raises(InvalidError, match="writable"):
        store.load(keys[0], bytes(RAW_BYTES), raw_bytes=RAW_BYTES)
    with pytest.raises(InvalidError, match="raw_bytes"):
        store.store(chunk_at(keys, 0), Buffer.allocate(RAW_BYTES))

    rootwide = open_store(namespace=None)
    with pytest.raises(InvalidError, match="namespace"):
        rootwide.longest_prefix(keys)
    with pytest.raises(InvalidError, match="namespace"):
        rootwide.touch(keys)

    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.contains(keys)


def test_a_forgotten_close_warns(root: str) -> None:
    """An opened store that is dropped says so, and still gives back what it holds."""
    store = PrefixStore.open(root, namespace=FIELDS, index=None, background=False)
    forgotten = [store]
    del store
    with pytest.warns(ResourceWarning, match="not closed"):
        forgotten.clear()


def test_opening_does_not_create_when_told_so(root: str) -> None:
    """Maintenance of a mistyped path must not leave a root there."""
    with pytest.raises((InvalidError, UnavailableError)):
        PrefixStore.open(root, create=False)
    assert not Path(root).exists()


def test_threads_share_one_store(open_store: OpenStore) -> None:
    """Eight threads store, load, touch and look up the same chains without a wrong byte."""
    store = open_store(background=True, config={"touch_interval_s": 0})
    chains = [chain(str(number), 12) for number in range(4)]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(6):
                keys = chains[(number + turn) % 4]
                store_chain(store, keys)
                store.touch(keys)
                wrong.extend(key for key in keys if load(store, key) != payload_of(key))
                if store.longest_prefix(keys) != len(keys):
                    wrong.append(keys)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert store.stats().chunks == 48


def test_orphans_of_dead_writers_are_reaped(open_store: OpenStore) -> None:
    """A writer that was killed leaves a temporary file; the next writer's background removes it."""
    keys = chain("a", 1)
    first = open_store()
    dead = "0" * 32
    namespace = next(first.root.namespaces())
    orphan = Path(first.root.layout.temporary(namespace, keys[0], writer=dead, number=0))
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half a blob")
    document = msgspec.structs.replace(this_process(), started="never")
    Path(first.root.layout.writer(dead)).write_bytes(msgspec.json.encode(document))
    store = open_store()
    store_chain(store, keys)
    store.work()

    assert not orphan.exists()
    assert payload_of(keys[0]) == load(store, keys[0])


def test_an_unstored_parent_does_not_keep_a_chunk_out(open_store: OpenStore) -> None:
    """A hole in a chain is a miss at its place and nowhere else."""
    store, keys = open_store(), chain("a", 3)
    store.store(chunk_at(keys, 2), payload_of(keys[2]))

    assert payload_of(keys[2]) == load(store, keys[2])
    assert load(store, keys[1]) == "absent"
    assert store.contains(keys) == [False, False, True]


def test_a_chunk_needs_no_parent_of_its_length(open_store: OpenStore) -> None:
    """Keys of another hash length live side by side."""
    store = open_store()
    short = Chunk(key=Key(bytes(range(12))), parent=None, end_token=16)
    store.store(short, payload_of(short.key))

    assert payload_of(short.key) == load(store, short.key)
