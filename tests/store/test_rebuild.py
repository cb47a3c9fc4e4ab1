"""A fresh index is built in the background; nothing that an engine asks for waits for that."""

import threading
import time
from collections.abc import Callable

from prefixstore.store import PrefixStore
from prefixstore.testing.chains import chain, chunk_at, load, payload_of, store_chain
from prefixstore.testing.faults import FaultyOs, Hang, When
from prefixstore.tree.osfs import RealOs

OpenStore = Callable[..., PrefixStore]


def test_lookups_loads_and_stores_go_on_while_the_index_is_rebuilt(
    open_store: OpenStore,
) -> None:
    """A rebuild that hangs in a listing delays nobody, and ends when the listing does."""
    keys, new = chain("old", 40), chain("new", 1)
    store_chain(open_store(index=None), keys)
    gate = threading.Event()
    hang = When(
        fault=Hang(gate),
        name="scan",
        matches=lambda call: "/ns/" in call.path,
        forever=True,
    )
    calls = FaultyOs(RealOs(), hang)
    store = open_store(index=None, os_calls=calls, background=True)
    try:
        deadline_s = time.monotonic() + 10
        while not calls.count("scan"):
            assert time.monotonic() < deadline_s, "no rebuild began"
            time.sleep(0.01)

        assert store.longest_prefix(keys) == len(keys)
        assert [load(store, key) for key in keys] == [payload_of(key) for key in keys]
        assert store.store(chunk_at(new, 0), payload_of(new[0])).published
        assert not store.stats().complete
    finally:
        gate.set()
    assert store.wait_idle(30)
    stats = store.stats()
    assert (stats.complete, stats.chunks) == (True, len(keys) + 1)


def test_a_rebuilt_index_is_complete_again(open_store: OpenStore) -> None:
    """Forgetting all and asking for a rebuild answers from the tree meanwhile."""
    keys = chain("old", 40)
    store = open_store(background=True)
    store_chain(store, keys)
    assert store.wait_idle(30)

    store.rebuild()
    assert store.longest_prefix(keys) == len(keys)
    assert store.wait_idle(30)
    stats = store.stats()
    assert (stats.complete, stats.chunks) == (True, len(keys))
