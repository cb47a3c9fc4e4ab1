"""Eviction where blobs cannot be removed: what is damaged stays, and keeps nothing else from going."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.keys import Key, make_key
from prefixstore.store import PrefixStore
from prefixstore.store.tally import LEAF_FAILURES_MAX, OUTER_FAILURES_MAX, OUTERS_MAX
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Call, Fail, FaultyOs, When
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]


def keys_below(fan: bytes, count: int) -> list[Key]:
    """Return keys that begin alike, so that their blobs lie below one directory."""
    return [make_key(fan + key[len(fan) :]) for key in chain(fan.hex(), count)]


def store_each(store: PrefixStore, keys: list[Key]) -> None:
    """Store chunks that have no parents."""
    for key in keys:
        assert store_chain(store, [key])[0].reason is None


def there(store: PrefixStore, keys: list[Key]) -> int:
    """Count the blobs of some keys in the tree, past every index."""
    assert store.namespace is not None
    return sum(Path(store.root.layout.blob(store.namespace, key)).exists() for key in keys)


def failing(matches: Callable[[Call], bool], *names: str, error: int = errno.EIO) -> When:
    """Return the fault of calls of some names."""
    return When(
        fault=Fail(error), matches=lambda call: call.name in names and matches(call), forever=True
    )


@pytest.mark.parametrize("fan", [b"\0\0", b"\0"])
def test_a_damaged_directory_does_not_end_eviction(open_store: OpenStore, fan: bytes) -> None:
    """Its chunks are the oldest and stay; others go in their place, and few are tried in vain."""
    clock, calls = ManualClock(), FaultyOs(RealOs())
    store = open_store(clock=clock, os_calls=calls, index=None)
    bad, sound = keys_below(fan, 40), chain("sound", 60)
    store_each(store, bad)
    clock.advance(100)
    store_each(store, sound)
    directory = "/".join(f"{each:02x}" for each in fan)
    calls.reset(failing(lambda call: f"/{directory}/" in call.path, "unlink"))
    report = store.evict(70 * FILE_BYTES)

    tried = sum(call.name == "unlink" and f"/{directory}/" in call.path for call in calls.calls)
    assert (there(store, bad), there(store, sound)) == (40, 30)
    assert (report.evicted_chunks, report.left_bytes, report.short_bytes) == (
        30,
        70 * FILE_BYTES,
        0,
    )
    assert report.kept == {"error": 30}
    assert tried <= (LEAF_FAILURES_MAX if len(fan) == 2 else OUTER_FAILURES_MAX)
    assert "EIO" in report.errors[0]


def test_one_blob_that_cannot_go_keeps_none_beside_it(open_store: OpenStore) -> None:
    """A single bad file of a directory is passed over."""
    calls, keys = FaultyOs(RealOs()), keys_below(b"\0\0", 10)
    store = open_store(os_calls=calls, index=None)
    store_each(store, keys)
    calls.reset(failing(lambda call: call.path.endswith(f"{keys[0].hex()}.kv"), "unlink"))
    report = store.evict(0)

    assert (there(store, keys), report.evicted_chunks, report.kept) == (1, 9, {"error": 1})
    assert (report.left_chunks, report.short_bytes) == (1, FILE_BYTES)


def test_a_root_that_cannot_be_written_is_given_up(open_store: OpenStore) -> None:
    """After failures in many directories, not after one for each chunk."""
    calls, keys = FaultyOs(RealOs()), chain("a", 200)
    store = open_store(os_calls=calls, index=None)
    store_each(store, keys)
    calls.reset(failing(lambda call: call.path.endswith(".kv"), "unlink", error=errno.EROFS))
    report = store.evict(0)

    tried = sum(call.name == "unlink" and call.path.endswith(".kv") for call in calls.calls)
    assert (there(store, keys), report.evicted_chunks, report.left_chunks) == (200, 0, 200)
    assert OUTERS_MAX <= tried <= 2 * OUTERS_MAX


def test_a_namespace_of_another_user_does_not_end_eviction(open_store: OpenStore) -> None:
    """None of its chunks can be removed, though they are the oldest; those of others go instead."""
    clock, calls = ManualClock(), FaultyOs(RealOs())
    theirs = open_store(namespace={**FIELDS, "model": "theirs"}, clock=clock, index=None)
    bad, sound = chain("bad", 100), chain("sound", 60)
    store_each(theirs, bad)
    clock.advance(100)
    store = open_store(clock=clock, os_calls=calls, index=None)
    store_each(store, sound)
    calls.reset(
        failing(lambda call: f"/{theirs.namespace}/" in call.path, "unlink", error=errno.EACCES)
    )
    report = store.evict(130 * FILE_BYTES)

    tried = sum(
        call.name == "unlink" and f"/{theirs.namespace}/" in call.path for call in calls.calls
    )
    assert (there(theirs, bad), there(store, sound), report.short_bytes) == (100, 30, 0)
    assert tried <= 2 * OUTERS_MAX


def test_a_torn_file_that_cannot_go_keeps_none_of_the_others(open_store: OpenStore) -> None:
    """After a power cut with a damaged directory the rest is cleaned up, in few calls that fail."""
    calls = FaultyOs(RealOs())
    store = open_store(os_calls=calls, index=None)
    bad, sound = keys_below(b"\0\0", 10), chain("sound", 10)
    store_each(store, bad + sound)
    assert store.namespace is not None
    for key in bad + sound:
        path = Path(store.root.layout.blob(store.namespace, key))
        path.write_bytes(b"")
        os.utime(path, (1, 1))
    calls.reset(failing(lambda call: "/00/00/" in call.path, "unlink"))
    store.evict(10**9)

    tried = sum(call.name == "unlink" and "/00/00/" in call.path for call in calls.calls)
    assert (there(store, bad), there(store, sound)) == (10, 0)
    assert tried == LEAF_FAILURES_MAX
