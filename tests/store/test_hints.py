"""Hints: an index that fails is replaced once, and nobody notices but the counters."""

import errno
import threading

import pytest

from prefixstore.errors import ClosedError, UnavailableError
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.index.records import Record
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.hints import Hints

NAMESPACE = NamespaceId("ab" * 16)
KEYS = [Key(number.to_bytes(12, "big")) for number in range(3000)]
ENTRIES = [(NAMESPACE, key, Record(file_bytes=8192, used_s=at)) for at, key in enumerate(KEYS)]


class Breakable(MemoryIndex):
    """An index that works until it is told not to."""

    broken = False

    def _check_open(self) -> None:
        super()._check_open()
        if self.broken:
            raise UnavailableError(errno.EIO, "broken on purpose")


def test_every_question_survives_a_broken_index() -> None:
    """Each method answers as an empty index does."""
    questions = [
        (lambda hints: hints.get_many(NAMESPACE, KEYS[:2]), [None, None]),
        (lambda hints: hints.known_prefix(NAMESPACE, KEYS), 0),
        (lambda hints: hints.row(NAMESPACE, KEYS[0]), None),
        (lambda hints: hints.refs(NAMESPACE, KEYS[0]), (0, 0)),
        (lambda hints: hints.put_many(ENTRIES[:2]), None),
        (lambda hints: hints.remove_many(NAMESPACE, KEYS), 0),
        (lambda hints: hints.touch_many(NAMESPACE, KEYS, used_s=1), []),
        (lambda hints: hints.set_pins({(NAMESPACE, KEYS[0]): 1}), None),
        (lambda hints: list(hints.oldest_first()), []),
        (lambda hints: list(hints.scan()), []),
        (lambda hints: hints.totals(), {}),
        (lambda hints: hints.mark("complete"), None),
        (lambda hints: hints.set_mark("complete", "1"), None),
        (lambda hints: hints.renew(), None),
        (lambda hints: hints.clear(), None),
    ]
    for ask, expected in questions:
        index = Breakable()
        index.put_many(ENTRIES[:2])
        hints = Hints(index)
        index.broken = True

        assert ask(hints) == expected
        assert (hints.failures, hints.kind) == (1, "MemoryIndex")


def test_an_index_is_named_for_as_long_as_it_keeps_what_it_holds() -> None:
    """Rows come and go; cleared, or replaced, it is another one."""
    index = Breakable()
    hints = Hints(index)
    first = hints.generation()
    hints.put_many(ENTRIES[:2])
    hints.remove_many(NAMESPACE, KEYS[:1])
    hints.renew()
    assert hints.generation() == first

    hints.clear()
    second = hints.generation()
    index.broken = True
    assert len({first, second, hints.generation()}) == 3
    assert hints.failures == 1


def test_an_iteration_ends_early_when_the_index_breaks() -> None:
    """What was read stays read; the rest is for a later scan."""
    index = Breakable()
    index.put_many(ENTRIES)
    hints = Hints(index)
    rows = hints.scan()
    next(rows)
    index.broken = True

    assert sum(1 for _ in rows) < len(ENTRIES) - 1
    assert hints.failures == 1


def test_threads_that_meet_one_failure_replace_the_index_once() -> None:
    """All of them go on with the same new index."""
    index = Breakable()
    hints = Hints(index)
    index.broken = True
    gate = threading.Barrier(8)

    def learn(at: int) -> None:
        gate.wait()
        for _ in range(100):
            hints.put_many(ENTRIES[at : at + 1])

    threads = [threading.Thread(target=learn, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert hints.failures == 1
    assert hints.totals()[NAMESPACE].chunks == 8


def test_a_closed_index_stays_closed() -> None:
    """Use after close is a bug of the caller and is told as one."""
    hints = Hints(MemoryIndex())
    hints.close()

    with pytest.raises(ClosedError):
        hints.totals()
    with pytest.raises(ClosedError):
        list(hints.scan())
    assert hints.failures == 0
