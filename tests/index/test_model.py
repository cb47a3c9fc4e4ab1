"""LmdbIndex does, step by step, what MemoryIndex does: over reopenings, kills and mixed users."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.index.records import Record
from prefixstore.testing.index_contract import ONE, TWO, chain, check_counts

KEYS = [*chain(4), *chain(2, seed=1)]
namespaces = st.sampled_from([ONE, ONE, TWO])
some_keys = st.lists(st.sampled_from(KEYS), max_size=5)
seconds = st.integers(0, 5)
records = st.builds(
    Record,
    file_bytes=st.integers(0, 3),
    raw_bytes=st.integers(0, 3),
    end_token=st.integers(0, 3),
    parent=st.one_of(st.none(), st.sampled_from(KEYS)),
    used_s=seconds,
    touched_s=seconds,
    presumed=st.booleans(),
)


class TwoIndexes(RuleBasedStateMachine):
    """Drive both with one sequence; parents are drawn without regard to chains, loops included."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.model = MemoryIndex()
        self.index = self.open()

    def open(self):
        return LmdbIndex.open(self.directory, store_id="store", map_bytes=2**20)

    def both(self, act):
        """Return the one answer of both."""
        expected, actual = act(self.model), act(self.index)
        assert expected == actual
        return actual

    @rule(entries=st.lists(st.tuples(namespaces, st.sampled_from(KEYS), records), max_size=5))
    def put(self, entries):
        self.both(lambda index: index.put_many(entries))

    @rule(namespace=namespaces, keys=some_keys)
    def remove(self, namespace, keys):
        self.both(lambda index: index.remove_many(namespace, keys))

    @rule(namespace=namespaces, keys=some_keys, used_s=seconds, refresh_s=st.none() | seconds)
    def touch(self, namespace, keys, used_s, refresh_s):
        self.both(
            lambda index: index.touch_many(namespace, keys, used_s=used_s, refresh_s=refresh_s)
        )

    @rule(
        pins=st.dictionaries(
            st.tuples(namespaces, st.sampled_from(KEYS)), st.integers(0, 2), max_size=4
        )
    )
    def pin(self, pins):
        self.both(lambda index: index.set_pins(pins))

    @rule(name=st.sampled_from(["rebuilt", "cursor"]), value=st.sampled_from([None, "a", "b"]))
    def mark(self, name, value):
        self.both(lambda index: index.set_mark(name, value))

    @rule(namespace=namespaces, keys=some_keys)
    def look_up(self, namespace, keys):
        self.both(lambda index: index.get_many(namespace, keys))
        self.both(lambda index: index.known_prefix(namespace, keys))

    @precondition(lambda self: self.index.totals())
    @rule()
    def clear(self):
        self.both(lambda index: index.clear())

    @rule()
    def reopen(self):
        self.index.close()
        self.index = self.open()

    @rule(entries=st.lists(st.tuples(namespaces, st.sampled_from(KEYS), records), max_size=5))
    def put_in_a_child_that_is_killed(self, entries):
        """Another process writes, commits, and is killed with everything open."""
        pid = os.fork()
        if pid == 0:
            try:
                self.open().put_many(entries)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        self.model.put_many(entries)

    @invariant()
    def same_rows(self):
        self.both(lambda index: list(index.scan()))
        self.both(lambda index: list(index.oldest_first()))
        self.both(lambda index: list(index.oldest_first(TWO)))
        self.both(lambda index: index.totals())
        self.both(lambda index: [index.refs(ns, key) for ns in (ONE, TWO) for key in KEYS])
        self.both(lambda index: [index.row(ONE, key) for key in KEYS])
        self.both(lambda index: [index.mark(name) for name in ("rebuilt", "cursor")])
        check_counts(self.index, [(ns, key) for ns in (ONE, TWO) for key in KEYS])

    def teardown(self):
        self.index.close()
        self.model.close()
        shutil.rmtree(self.directory)


TwoIndexes.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestTwoIndexes = TwoIndexes.TestCase
