"""PrefixStore beside a dict: a state machine that runs both and compares what they say.

The model is a dict of what was published and a set of pins. After every step, whatever was crashed,
lost or reopened before:

    never wrong KV     a load brings exactly the bytes of its key, or a miss
    nothing is lost    what was published and neither evicted nor removed is found and loads, by every
                       store of the root, with whatever index
    prefixes stay      no chunk is in the tree whose parent was evicted before it
    counts are right   the index, once reconciled, equals a recount of the tree

Subclass ``StoreMachine`` with a ``make`` that opens a root, to run it on another filesystem or index.
Where hosts see each other late, say in ``sees`` and ``is_settled`` what a host may not know yet.
"""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prefixstore.blob.header import BlobHeader
from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import Chunk, PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, RAW_BYTES, chain, load, payload_of
from prefixstore.testing.clock import ManualClock

__all__ = ["StoreMachine", "recount"]

CHAINS = 3
LENGTH = 6
STORES = 2

chunk_places = st.tuples(st.integers(0, CHAINS - 1), st.integers(0, LENGTH - 1))
store_numbers = st.integers(0, STORES - 1)


def tree_of_chains() -> tuple[list[list[Key]], dict[Key, Key | None]]:
    """Return chains that share their first two chunks, and each key's parent."""
    trunk = chain("trunk", 2)
    chains = [trunk + chain(f"branch {number}", LENGTH - 2) for number in range(CHAINS)]
    parents = {key: keys[at - 1] if at else None for keys in chains for at, key in enumerate(keys)}
    return chains, parents


def recount(store: PrefixStore) -> tuple[dict[Key, int], Counter[Key]]:
    """Read from the tree alone which chunks there are, with their file bytes, and count children."""
    sizes: dict[Key, int] = {}
    children: Counter[Key] = Counter()
    assert store.namespace is not None
    for _, entries in store.tree.scan(store.namespace):
        for entry in entries:
            header = store.tree.read_header(store.namespace, entry.key)
            assert isinstance(header, BlobHeader), header
            sizes[entry.key] = entry.file_bytes
            if header.parent is not None:
                children[header.parent] += 1
    return sizes, children


class StoreMachine(RuleBasedStateMachine):
    """Two stores of one root, used in turn, beside a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="prefixstore-model-"))
        self.clock = ManualClock()
        self.chains, self.parents = tree_of_chains()
        self.published: set[Key] = set()
        self.pins: dict[str, frozenset[Key]] = {}
        # Pins that hold nothing any more; their files stay until an eviction meets them.
        self.ended: set[str] = set()
        self.stores: list[PrefixStore] = []

    def make(self, number: int) -> PrefixStore:
        """Open the root once more; each store has its own host's index."""
        config = StoreConfig(
            index_dir=str(self.directory / f"index-{number}"),
            direct_io="off",
            miss_ttl_s=0,
            touch_interval_s=5,
        )
        return PrefixStore.open(
            str(self.directory / "root"),
            namespace=FIELDS,
            config=config,
            clock=self.clock,
            background=False,
        )

    @initialize()
    def open(self) -> None:
        """Open both stores."""
        self.stores = [self.make(number) for number in range(STORES)]

    @rule(number=store_numbers, place=chunk_places)
    def store_prefix(self, number: int, place: tuple[int, int]) -> None:
        """Publish a chain up to a place, as an engine does."""
        keys = self.chains[place[0]][: place[1] + 1]
        for at, key in enumerate(keys):
            chunk = Chunk(key=key, parent=self.parents[key], end_token=16 * (at + 1))
            outcome = self.stores[number].store(chunk, payload_of(key))
            assert outcome.published, outcome
            assert outcome.existed == (key in self.published)
            self.note_published(number, key)

    @rule(number=store_numbers, place=chunk_places)
    def load(self, number: int, place: tuple[int, int]) -> None:
        """Load one chunk: its own bytes, or a miss if it is not there."""
        key = self.chains[place[0]][place[1]]
        found = load(self.stores[number], key)
        if found != "absent" or self.sees(number, key):
            assert found == (payload_of(key) if key in self.published else "absent")

    @rule(number=store_numbers, which=st.integers(0, CHAINS - 1))
    def look_up(self, number: int, which: int) -> None:
        """Look for a chain and for its chunks one by one."""
        keys = self.chains[which]
        self.advance(2)  # What was seen a moment ago is believed for a second.
        there = [key in self.published for key in keys]
        depth = (*there, False).index(False)
        found = self.stores[number].longest_prefix(keys)
        if not self.is_settled(number):
            return
        if sum(there) == depth:  # A hole in a chain may go unseen until the load.
            assert found == depth
        answers = self.stores[number].contains(keys)
        # Rows of a store that another one evicts behind may promise too much, never too little.
        assert all(answer for answer, is_there in zip(answers, there, strict=True) if is_there)

    @rule(number=store_numbers, place=chunk_places)
    def touch(self, number: int, place: tuple[int, int]) -> None:
        """Use a chain again."""
        self.stores[number].touch(self.chains[place[0]][: place[1] + 1])

    @rule(number=store_numbers)
    def work(self, number: int) -> None:
        """Let the background catch up."""
        self.stores[number].work()

    @rule(duration_s=st.integers(1, 100))
    def wait(self, duration_s: int) -> None:
        """Let time pass."""
        self.advance(duration_s)

    @rule(
        number=store_numbers,
        name=st.sampled_from(["a", "b"]),
        place=chunk_places,
        first=st.integers(0, LENGTH - 1),
    )
    def pin(self, number: int, name: str, place: tuple[int, int], first: int) -> None:
        """Pin some of a chain, stored or not; pins of chains that begin alike overlap."""
        keys = self.chains[place[0]][min(first, place[1]) : place[1] + 1]
        self.stores[number].pin(name, keys)
        self.pins[name] = frozenset(keys)
        self.note_pinned(number, name)

    @rule(number=store_numbers, name=st.sampled_from(["a", "b"]))
    def unpin(self, number: int, name: str) -> None:
        """Remove a pin."""
        self.note_changed(number)
        removed = self.stores[number].unpin(name)
        assert removed == (name in self.pins) or name in self.ended
        self.pins.pop(name, None)

    @rule(number=store_numbers, chunks=st.integers(0, 8))
    def evict(self, number: int, chunks: int) -> None:
        """Evict down to a number of chunks; what must stay stays."""
        self.note_changed(number)
        before = set(self.published)
        report = self.stores[number].evict(chunks * FILE_BYTES)
        after = self.in_tree()
        self.published &= after
        seen = {key for key in before if self.sees(number, key)}
        must_stay = self.held(number, seen)
        assert must_stay <= after, "pinned chunks and their ancestors stay"
        if not self.is_settled(number):
            return
        assert len(after) == max(chunks, len(must_stay)) or len(before) <= chunks
        assert (len(before) - len(after), len(after)) == (report.evicted_chunks, report.left_chunks)
        assert all(self.parents[key] in after for key in after if self.parents[key] in before)

    @rule(number=store_numbers, place=chunk_places)
    def remove(self, number: int, place: tuple[int, int]) -> None:
        """Remove a chunk and all that follows it in every chain, but for what a pin needs."""
        key = self.chains[place[0]][place[1]]
        doomed = {key, *self.descendants(key)} - self.held(number, self.published)
        self.note_changed(number)
        report = self.stores[number].remove(sorted(doomed))
        gone = self.published - self.in_tree()
        assert gone <= doomed - self.pinned(number)
        assert report.evicted_chunks == len(gone)
        if self.is_settled(number):
            assert gone == doomed & self.published - self.pinned(number)
        self.published -= gone

    @rule(number=store_numbers)
    def crash(self, number: int) -> None:
        """Drop a store as SIGKILL does: nothing is flushed, nothing is left in order."""
        self.bury(number)
        self.stores[number] = self.make(number)

    @rule(number=store_numbers)
    def reopen(self, number: int) -> None:
        """Close a store in order and open it again."""
        self.stores[number].close()
        self.stores[number] = self.make(number)

    @rule(number=store_numbers)
    def lose_index(self, number: int) -> None:
        """Delete a host's index while its store is closed."""
        self.stores[number].close()
        shutil.rmtree(self.directory / f"index-{number}")
        self.stores[number] = self.make(number)

    def bury(self, number: int) -> None:
        """Let go of what a killed process leaves in this one."""
        store = self.stores[number]
        store._closed = True  # noqa: SLF001 - a killed process closes nothing
        store.hints.close()

    @invariant()
    def tree_is_as_published(self) -> None:
        """The tree holds what was published, no more and no less."""
        if self.stores:
            assert self.in_tree() == self.published

    def teardown(self) -> None:
        """Compare each index with a recount of the tree, then close."""
        try:
            # A store that is closed was left so by a step that failed: its error is the one to tell.
            if not any(store._closed for store in self.stores):  # noqa: SLF001 - as above
                self.settle()
                for store in self.stores:
                    self.check_counts(store)
        finally:
            for store in self.stores:
                store.close()
            shutil.rmtree(self.directory)

    def check_counts(self, store: PrefixStore) -> None:
        """Reconcile an index and hold it against the tree."""
        store.reconcile()
        sizes, children = recount(store)
        pins = Counter(key for keys in self.pins.values() for key in keys)
        rows = {row.key: row for row in store.hints.scan(store.namespace)}
        assert {key: row.record.file_bytes for key, row in rows.items()} == sizes
        assert all(row.record.raw_bytes == RAW_BYTES for row in rows.values())
        for key, row in rows.items():
            assert row.refs == (children[key], pins[key])
            assert row.record.parent == self.parents[key]
        assert store.stats().chunks == len(sizes)

    # What hosts that see each other late override.

    def advance(self, duration_s: float) -> None:
        """Let time pass for all."""
        self.clock.advance(duration_s)

    def settle(self) -> None:
        """Let so much time pass that every host sees what the others did."""

    def sees(self, number: int, key: Key) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a host must know by now of a chunk that is published."""
        return True

    def is_settled(self, number: int) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a host must know by now of all that others did."""
        return True

    def note_changed(self, number: int) -> None:
        """Note that a host changes the root now."""

    def note_published(self, number: int, key: Key) -> None:  # noqa: ARG002 - for subclasses
        """Note that a host has published a chunk, or found it published."""
        self.published.add(key)

    def note_pinned(self, number: int, name: str) -> None:
        """Note that a host has made a pin."""

    def pinned(self, number: int) -> frozenset[Key]:  # noqa: ARG002 - for subclasses
        """Return what the pins hold that a host must know of by now."""
        return frozenset().union(*self.pins.values())

    # Inside.

    def in_tree(self) -> set[Key]:
        """Return the keys whose blob file exists."""
        return {
            Key(bytes.fromhex(path.stem)) for path in (self.directory / "root/ns").rglob("*.kv")
        }

    def held(self, number: int, stored: set[Key]) -> set[Key]:
        """Return what a host must leave: pinned chunks that are stored, and stored ancestors."""
        held: set[Key] = set()
        for key in self.pinned(number):
            at: Key | None = key
            while at is not None and at in stored:
                held.add(at)
                at = self.parents[at]
        return held

    def descendants(self, key: Key) -> list[Key]:
        """Return every key that follows ``key`` in some chain."""
        found = [each for each, parent in self.parents.items() if parent == key]
        return found + [each for child in found for each in self.descendants(child)]
