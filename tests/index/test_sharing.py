"""One environment, many users: processes, threads, forks, and a map that grows."""

import gc
import os
import resource
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixstore.errors import ClosedError, UnavailableError
from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.records import Record
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.index_contract import ONE, chain, check_counts, entries


def open_index(tmp_path, **options):
    """Open the one index of these tests."""
    return LmdbIndex.open(tmp_path / "index", store_id="store", **options)


def put_in_steps(index, keys):
    """Put a chain, 500 keys to a transaction."""
    rows = entries(keys, used_s=1)
    for start in range(0, len(rows), 500):
        index.put_many(rows[start : start + 500])


def test_rows_survive_a_reopening(tmp_path):
    """Rows, pins, marks and counts are there again."""
    keys = chain(5)
    with open_index(tmp_path) as index:
        index.put_many(entries(keys, used_s=4)[1:])
        index.set_pins({(ONE, keys[0]): 1})
        index.set_mark("rebuilt", "yes")
        rows = list(index.scan())
    with open_index(tmp_path) as index:
        assert rows == list(index.scan())
        assert index.refs(ONE, keys[0]) == (1, 1)
        assert index.mark("rebuilt") == "yes"
        check_counts(index)


def test_two_openings_in_a_process(tmp_path):
    """They see each other's rows, and the first close takes nothing from the second."""
    keys = chain(4)
    one, two = open_index(tmp_path), open_index(tmp_path)
    one.put_many(entries(keys[:2], used_s=1))
    assert two.known_prefix(ONE, keys) == 2
    one.close()
    two.put_many(entries(keys, used_s=1))
    with pytest.raises(ClosedError):
        one.get_many(ONE, keys)
    with open_index(tmp_path) as three:
        assert three.known_prefix(ONE, keys) == 4
    two.close()


def test_a_child_must_open_its_own(tmp_path, children):
    """What a child inherits raises, what it opens works, and the parent notices nothing."""
    keys = chain(6)
    with open_index(tmp_path) as index:
        index.put_many(entries(keys[:3], used_s=1))

        def work():
            with pytest.raises(UnavailableError, match="before a fork"):
                index.get_many(ONE, keys)
            with open_index(tmp_path) as own:
                assert own.known_prefix(ONE, keys) == 3
                own.put_many(entries(keys, used_s=1))
            index.close()
            with pytest.raises(ClosedError):
                index.put_many([])

        assert children.run(work) == 0, children.failures()
        assert index.known_prefix(ONE, keys) == 6
        index.put_many(entries(chain(6, seed=1), used_s=1))
        assert children.run(work_in_grandchild(tmp_path, children)) == 0, children.failures()
        check_counts(index)


def work_in_grandchild(tmp_path, children):
    """Return work that opens, forks again, and opens there, too."""

    def work():
        with open_index(tmp_path) as own:
            children.alive.clear()

            def deeper():
                with open_index(tmp_path) as deepest:
                    assert deepest.known_prefix(ONE, chain(6)) == 6

            assert children.run(deeper) == 0
            assert own.known_prefix(ONE, chain(6)) == 6

    return work


def test_forks_in_the_middle_of_writes(tmp_path, children):
    """A child that is forked while another thread is inside a transaction neither hangs nor harms."""
    stop = threading.Event()
    keys = chain(400)

    def churn(index):
        at = 0
        while not stop.is_set():
            index.put_many(entries(keys, used_s=at))
            index.remove_many(ONE, keys[200:])
            at += 1

    def use_or_refuse():
        signal.alarm(20)
        try:
            with open_index(tmp_path) as own:
                own.touch_many(ONE, keys, used_s=5)
        except UnavailableError:
            # The inherited handle was in use: it stays as it is, and so this process has no index.
            pass

    with open_index(tmp_path) as index, ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn, index)
        with warnings.catch_warnings():
            # Python 3.12 warns of what is done here on purpose.
            warnings.simplefilter("ignore", DeprecationWarning)
            codes = [children.run(use_or_refuse) for _ in range(40)]
        stop.set()
        churning.result()
        assert codes == [0] * 40, children.failures()
        check_counts(index)


def test_the_map_grows_under_many_processes(tmp_path, children):
    """From 1 MiB on, four processes put 24,000 rows without an error or a loss."""
    chains = {seed: chain(6000, seed=seed) for seed in range(4)}

    def fill(seed):
        with open_index(tmp_path, map_bytes=2**20) as index:
            for start in range(0, 6000, 200):
                index.put_many(entries(chains[seed], used_s=seed)[start : start + 200])

    pids = [children.start(lambda seed=seed: fill(seed)) for seed in chains]
    assert [children.wait(pid) for pid in pids] == [0] * 4, children.failures()
    with open_index(tmp_path, map_bytes=2**20) as index:
        assert index.map_bytes() > 2**20
        assert [index.known_prefix(ONE, chains[seed]) for seed in chains] == [6000] * 4
        check_counts(index)


def test_growth_ends_at_its_limit(tmp_path):
    """At the limit puts fail with what to do, reads go on, and removing makes room again."""
    keys = chain(20_000)
    with open_index(tmp_path, map_bytes=2**20, map_bytes_max=2**21) as index:
        with pytest.raises(UnavailableError, match="map_bytes_max"):
            put_in_steps(index, keys)
        known = index.known_prefix(ONE, keys)
        assert known > 1000
        check_counts(index)
        assert index.remove_many(ONE, keys[500:]) == known - 500
        index.put_many(entries(keys[:600], used_s=2))
        check_counts(index)


def test_threads_grow_the_map_together(tmp_path):
    """Readers and writers of one process survive each other's growing map."""
    with (
        open_index(tmp_path, map_bytes=2**20) as index,
        open_index(tmp_path) as same,
        ThreadPoolExecutor(6) as pool,
    ):
        chains = {seed: chain(3000, seed=seed) for seed in range(3)}

        def write(seed):
            for start in range(0, 3000, 100):
                index.put_many(entries(chains[seed], used_s=seed)[start : start + 100])

        def read(seed):
            for _ in range(200):
                assert 0 <= same.known_prefix(ONE, chains[seed]) <= 3000
                same.get_many(ONE, chains[seed][:50])

        for future in [pool.submit(work, seed) for seed in chains for work in (write, read)]:
            future.result()
        assert index.map_bytes() > 2**20
        check_counts(index)


def test_a_full_disk_is_an_error(tmp_path, children):
    """Where the file cannot grow, puts fail, reads go on, and nothing dies."""
    keys = chain(20_000)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open_index(tmp_path) as index:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
            with pytest.raises(UnavailableError, match="space"):
                put_in_steps(index, keys)
        os._exit(0)

    assert children.run(work) == 0, children.failures()
    with open_index(tmp_path) as index:
        check_counts(index)
        assert index.known_prefix(ONE, keys) % 500 == 0


def test_killed_readers_are_cleared_each_minute(tmp_path, children):
    """A reader that was killed inside a read stops pinning pages within a minute."""
    clock = ManualClock()

    def die_reading():
        with open_index(tmp_path) as own:
            own._read(lambda _txn: os.kill(os.getpid(), signal.SIGKILL))

    with open_index(tmp_path, clock=clock) as index:
        index.put_many(entries(chain(5), used_s=1))
        assert children.run(die_reading) == -signal.SIGKILL
        handle = index._environment.handle
        assert handle.readers().count("\n") > 1
        clock.advance(61)
        index.totals()
        assert "no active readers" in handle.readers()


def test_a_stopped_writer_does_not_stop_readers(tmp_path, children):
    """Reads never wait for a process that was stopped inside a transaction."""
    keys = chain(3)

    def stop_writing():
        with open_index(tmp_path) as own:
            own._write(lambda _txn: os.kill(os.getpid(), signal.SIGSTOP))

    with open_index(tmp_path) as index:
        index.put_many(entries(keys, used_s=1))
        pid = children.start(stop_writing)
        os.waitpid(pid, os.WUNTRACED)
        waiting = threading.Thread(target=lambda: index.touch_many(ONE, keys, used_s=2))
        waiting.start()
        for _ in range(50):
            assert index.known_prefix(ONE, keys) == 3
        assert waiting.is_alive()
        os.kill(pid, signal.SIGCONT)
        waiting.join(20)
        assert children.wait(pid) == 0, children.failures()
        assert [2, 2, 2] == [row.record.used_s for row in index.scan()]


def test_a_forgotten_close_warns(tmp_path):
    """An index that is dropped open says so, and stays open underneath."""

    def forget():
        open_index(tmp_path).put_many([(ONE, chain(1)[0], Record())])
        gc.collect()

    with pytest.warns(ResourceWarning, match="was not closed"):
        forget()
    with open_index(tmp_path) as again:
        assert again.totals()[ONE].chunks == 1
