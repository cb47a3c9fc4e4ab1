"""The engine's side of the I/O process: exact, bounded, and never wrong about where bytes land."""

import dataclasses
import errno
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import ChunkChange, FindDone, LoadDone, StoreDone
from tests.ioproc.conftest import (
    PAYLOAD_BYTES,
    ShiftedClock,
    Slots,
    await_jobs,
    await_state,
    chain,
    payload,
    store_chain,
    wait_until,
)


def pid_of(client: IoClient) -> int | None:
    """Return the pid of the client's I/O process, None while it has none."""
    process = client._pump._process
    return None if process is None else process.pid


def child_of(client: IoClient) -> int:
    """Return the pid of the client's I/O process, which it has."""
    pid = pid_of(client)
    assert pid is not None
    return pid


def runs(pid: int) -> bool:
    """Whether a process runs; one that is dead and not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def stop(pid: int) -> None:
    """Send SIGSTOP and wait until every thread of the process stands still."""
    os.kill(pid, signal.SIGSTOP)

    def stands() -> bool:
        states = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat"))
        return all(state.rpartition(")")[2].split()[0] == "T" for state in states)

    wait_until(stands, "the process to stand still")


def test_what_was_stored_is_found_and_loaded_as_it_was(client):
    """A chain stored through the I/O process comes back byte for byte."""
    keys = chain(20)
    store_chain(client, keys)
    slots = Slots()
    for i in range(20):
        slots.put(i, bytes(PAYLOAD_BYTES))

    client.find(1, [*keys, *chain(3, salt=9)], chained=True)
    (found,) = await_jobs(client)
    client.load(2, [slots.load(key, i) for i, key in enumerate(keys)])
    (loaded,) = await_jobs(client)

    assert isinstance(found, FindDone)
    assert [True] * 20 + [False] * 3 == found.present
    assert isinstance(loaded, LoadDone)
    assert set(keys) == set(loaded.landed)
    assert {i: payload(i) for i in range(20)} == {i: bytes(m) for i, m in slots.memory.items()}


def test_a_load_took_as_long_as_it_took_however_late_one_asks(make_client):
    """An engine in a long step hears of a load seconds after it ended."""
    clock = ShiftedClock()
    client = make_client(clock=clock)
    await_state(client, "on")
    keys = chain(2)
    store_chain(client, keys)
    slots = Slots()
    slots.put(0, bytes(PAYLOAD_BYTES))
    slots.put(1, bytes(PAYLOAD_BYTES))

    client.load(1, [slots.load(key, i) for i, key in enumerate(keys)])
    wait_until(lambda: bool(client._finished), "the load to end")
    clock.advance(5.0)
    (done,) = client.poll()

    assert set(keys) == set(done.landed)
    assert done.elapsed_s < 5.0


def test_a_missing_chunk_leaves_its_slot_alone(client):
    """A load keeps what it brought and says why the rest is missing."""
    keys = chain(3)
    store_chain(client, keys)
    slots = Slots()
    other = chain(1, salt=5)[0]
    slots.put(0, bytes(PAYLOAD_BYTES))
    slots.put(1, b"\xaa" * PAYLOAD_BYTES)

    client.load(1, [slots.load(keys[0], 0), slots.load(other, 1)])
    (done,) = await_jobs(client)

    assert [keys[0]] == done.landed
    assert {other: "absent"} == done.missed
    assert b"\xaa" * PAYLOAD_BYTES == bytes(slots.memory[1])


def test_a_damaged_chunk_is_a_miss_with_its_reason(client, root):
    """Bytes that fail the digest never reach a slot."""
    keys = chain(1)
    store_chain(client, keys)
    (blob,) = root.glob("ns/*/*/*/*.kv")
    damaged = bytearray(blob.read_bytes())
    damaged[5000] ^= 1
    blob.write_bytes(damaged)
    slots = Slots()
    slots.put(0, b"\xaa" * PAYLOAD_BYTES)

    client.load(1, [slots.load(keys[0], 0)])
    (done,) = await_jobs(client)

    assert {keys[0]: "digest"} == done.missed
    assert b"\xaa" * PAYLOAD_BYTES == bytes(slots.memory[0])


def test_storing_again_leaves_the_first_blob_alone(client):
    """A chunk that exists is reported as such."""
    keys = chain(2)
    store_chain(client, keys)
    slots = Slots()
    slots.put(0, payload(0))

    client.store(1, [slots.store(keys[0], 0)])
    (done,) = await_jobs(client)

    assert isinstance(done, StoreDone)
    assert ([keys[0]], [], {}) == (done.existed, done.stored, done.skipped)


def test_a_load_that_returns_after_its_deadline_never_reaches_the_reused_slot(make_client):
    """The reply of a process that stood still comes after the slot has another owner."""
    client = make_client(load_deadline_s=0.4, hang_s=60.0)
    await_state(client, "on")
    keys = chain(2)
    store_chain(client, keys)
    slots = Slots()
    slots.put(0, bytes(PAYLOAD_BYTES))
    child = child_of(client)
    stop(child)

    client.load(1, [slots.load(keys[0], 0)])
    (done,) = await_jobs(client)
    slots.memory[0][:] = b"\xbb" * PAYLOAD_BYTES  # The slot's next owner.
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not client._pump._operations, "the late reply")
    # The pump has taken the reply; a further job shows that it goes on, and with the same process.
    client.find(2, keys, chained=True)
    (found,) = await_jobs(client)

    assert {keys[0]: "timeout"} == done.missed
    assert [True, True] == found.present
    assert child == child_of(client)
    assert b"\xbb" * PAYLOAD_BYTES == bytes(slots.memory[0])


def test_a_store_given_up_never_reads_the_reused_slot(make_client):
    """A chunk whose slot was given back before it was copied is not published with other bytes."""
    client = make_client(store_deadline_s=0.4, hang_s=60.0, buffer_count=3)
    await_state(client, "on")
    keys = chain(12)
    slots = Slots()
    for i in range(12):
        slots.put(i, payload(i))
    child = child_of(client)
    stop(child)

    # More chunks than buffers: the last ones still wait for one when the deadline passes.
    assert client.store(1, [slots.store(key, i, end=16 * (i + 1)) for i, key in enumerate(keys)])
    (done,) = await_jobs(client)
    for i in range(12):
        slots.memory[i][:] = b"\xcc" * PAYLOAD_BYTES
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not client._pump._operations, "the late replies")
    for i in range(12):
        slots.put(i, bytes(PAYLOAD_BYTES))
    client.load(2, [slots.load(key, i) for i, key in enumerate(keys)])
    (loaded,) = await_jobs(client)

    assert set(keys) == set(done.skipped)
    assert loaded.landed, "what had been copied before is published all the same"
    for key in loaded.landed:
        assert payload(keys.index(key)) == bytes(slots.memory[keys.index(key)])


def test_a_killed_process_costs_its_operations_and_is_replaced(client):
    """SIGKILL of the I/O process ends jobs with misses; the next one serves again."""
    keys = chain(4)
    store_chain(client, keys)
    child = child_of(client)
    stop(child)
    slots = Slots()
    slots.put(0, bytes(PAYLOAD_BYTES))
    client.load(1, [slots.load(keys[0], 0)])
    wait_until(lambda: bool(client._pump._operations), "the load to be sent")

    os.kill(child, signal.SIGKILL)
    (done,) = await_jobs(client)
    await_state(client, "on")
    client.load(2, [slots.load(keys[0], 0)])
    (again,) = await_jobs(client)

    assert {keys[0]: "io_process"} == done.missed
    assert child != child_of(client)
    assert [keys[0]] == again.landed
    assert payload(0) == bytes(slots.memory[0])


def test_a_hung_process_is_killed_and_replaced(make_client):
    """A process whose oldest operation is too old is taken for hung on its mount."""
    clock = ShiftedClock()
    client = make_client(clock=clock, find_deadline_s=100.0, hang_s=200.0)
    await_state(client, "on")
    keys = chain(1)
    store_chain(client, keys)
    child = child_of(client)
    stop(child)

    client.find(1, keys, chained=True)
    wait_until(lambda: bool(client._pump._operations), "the find to be sent")
    clock.advance(101.0)
    (found,) = await_jobs(client)

    assert [False] == found.present
    assert not found.answered
    assert child == child_of(client)
    clock.advance(100.0)
    wait_until(lambda: pid_of(client) not in (child, None), "another process")
    await_state(client, "on")
    wait_until(lambda: not runs(child), "the end of the hung process")
    client.find(2, keys, chained=True)
    assert [True] == await_jobs(client)[0].present


def test_a_deadline_opens_the_breaker_and_an_answer_closes_it(make_client):
    """After a hang lookups are not worth their wait, until one is answered."""
    client = make_client(find_deadline_s=0.2, hang_s=60.0, breaker_s=60.0)
    await_state(client, "on")
    child = child_of(client)
    assert client.ready

    stop(child)
    client.find(1, chain(1), chained=True)
    await_jobs(client)
    assert not client.ready
    os.kill(child, signal.SIGCONT)

    wait_until(lambda: client.ready, "the breaker to close with the late answer")


def test_stores_accepted_before_a_kill_of_the_engine_are_published(root, tmp_path, make_client):
    """The I/O process of a killed engine publishes what lies complete in its buffers."""
    keys = chain(4)
    reader, writer = os.pipe()
    engine = os.fork()
    if engine == 0:
        try:
            client = make_client()
            await_state(client, "on")
            slots = Slots()
            child = child_of(client)
            stop(child)
            for i in range(len(keys)):
                slots.put(i, payload(i))
            client.store(1, [slots.store(key, i, end=16 * i + 16) for i, key in enumerate(keys)])
            wait_until(lambda: len(client._pump._operations) == len(keys), "all to be sent")
            os.write(writer, b"%d" % child)
            time.sleep(60)
        finally:
            os._exit(1)
    child = int(os.read(reader, 20))
    os.kill(engine, signal.SIGKILL)
    os.waitpid(engine, 0)
    os.kill(child, signal.SIGCONT)

    wait_until(lambda: not Path(f"/proc/{child}").exists(), "the orphaned I/O process to leave")

    client = make_client()
    await_state(client, "on")
    client.find(1, keys, chained=True)
    assert [True] * 4 == await_jobs(client)[0].present


def test_an_unreachable_root_is_tried_again_until_it_is_there(root, make_client):
    """A root that cannot be opened now leaves the store off; it opens by itself when it can."""
    root.parent.mkdir(exist_ok=True)
    root.write_text("in the way")
    client = make_client()
    await_state(client, "off")
    client.find(1, chain(2), chained=True)
    (found,) = await_jobs(client)

    assert [False, False] == found.present
    assert str(root) in client.reason

    root.unlink()
    await_state(client, "on")


def test_too_many_waiting_stores_are_refused_at_once(make_client):
    """A slow disk costs hits later, not slots now."""
    client = make_client(stores_waiting_max=4)
    await_state(client, "on")
    stop(child_of(client))
    slots = Slots()
    for i in range(5):
        slots.put(i, payload(i))
    keys = chain(5)

    try:
        assert client.store(1, [slots.store(keys[i], i) for i in range(4)])
        assert not client.store(2, [slots.store(keys[4], 4)])
    finally:
        os.kill(child_of(client), signal.SIGCONT)
    await_jobs(client)
    assert client.store(3, [slots.store(keys[4], 4)])
    await_jobs(client)


def test_changes_are_told_in_order_and_bounded(make_client, root):
    """Whoever asks for changes gets the latest, and how many were forgotten; nobody else keeps any."""
    client = make_client(changes_max=4)
    await_state(client, "on")
    keys = chain(6)
    store_chain(client, keys)
    changes, lost = client.take_changes()
    for blob in root.glob("ns/*/*/*/*.kv"):
        blob.unlink()
    slots = Slots()
    slots.put(0, bytes(PAYLOAD_BYTES))
    client.load(1, [slots.load(keys[0], 0)])
    await_jobs(client)
    wait_until(lambda: bool(client._pump.changes), "the chunk to be told of")

    assert 2 == lost
    assert set(keys) > {change.key for change in changes}
    assert [False] * 4 == [change.gone for change in changes]
    assert ([ChunkChange(keys[0], gone=True)], 0) == client.take_changes()


def test_draining_completes_every_job_in_bounded_time(make_client):
    """After a drain nothing of ours touches the caller's memory, whatever the process does."""
    client = make_client(hang_s=60.0)
    await_state(client, "on")
    keys = chain(3)
    store_chain(client, keys)
    child = child_of(client)
    stop(child)
    slots = Slots()
    for i in range(3):
        slots.put(i, bytes(PAYLOAD_BYTES))
    client.load(1, [slots.load(key, i) for i, key in enumerate(keys)])

    completions = client.drain(0.3)
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not client._pump._operations, "the late replies")

    assert [set(keys)] == [set(done.missed) for done in completions]
    assert not client.busy
    assert [bytes(PAYLOAD_BYTES)] * 3 == [bytes(slots.memory[i]) for i in range(3)]


def test_closing_publishes_queued_stores_and_leaves_no_process(client, make_client):
    """An orderly end loses nothing that was accepted."""
    keys = chain(30)
    slots = Slots()
    for i in range(30):
        slots.put(i, payload(i))
    child = child_of(client)
    client.store(1, [slots.store(key, i, end=16 * i + 16) for i, key in enumerate(keys)])

    client.close(10.0)

    assert not Path(f"/proc/{child}").exists()
    reopened = make_client()
    await_state(reopened, "on")
    reopened.find(1, keys, chained=True)
    assert [True] * 30 == await_jobs(reopened)[0].present


@pytest.mark.parametrize("died_of", [signal.SIGBUS, signal.SIGABRT])
def test_a_process_that_died_of_a_damaged_index_is_followed_by_one_without(client, died_of):
    """The next start discards the index, so that the damage cannot kill it, too."""
    keys = chain(2)
    store_chain(client, keys)

    os.kill(child_of(client), died_of)
    wait_until(lambda: client.state != "on", "the loss to be noticed")
    assert client._pump._discard_index
    await_state(client, "on")

    assert not client._pump._discard_index
    client.find(1, keys, chained=True)
    assert [True, True] == await_jobs(client)[0].present


def test_a_root_that_may_not_be_written_serves_hits_and_stores_nothing(make_client, root):
    """On a read-only mount the store is read-only: loads work, stores are skipped with a reason."""
    writer = make_client()
    await_state(writer, "on")
    keys = chain(3)
    store_chain(writer, keys)
    writer.close(5.0)
    subprocess.run(["mount", "--bind", root, root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", root], check=True)
        client = make_client()
        await_state(client, "read_only")
        slots = Slots()
        slots.put(0, bytes(PAYLOAD_BYTES))
        slots.put(1, payload(9))

        client.find(1, keys, chained=True)
        (found,) = await_jobs(client)
        client.load(2, [slots.load(keys[0], 0)])
        (loaded,) = await_jobs(client)
        other = chain(1, salt=3)[0]
        client.store(3, [slots.store(other, 1)])
        (stored,) = await_jobs(client)
        client.close(5.0)
    finally:
        subprocess.run(["umount", "-l", root], check=True)

    assert [True] * 3 == found.present
    assert [keys[0]] == loaded.landed
    assert {other: "read_only"} == stored.skipped


def test_a_closed_client_writes_to_no_file(client):
    """What comes after the end is dropped: the number of its wake-up file may be another file's by then."""
    number = client._pump._wake
    client.close(2.0)
    pipes = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(64)]
    try:
        assert number in pipes
        client.touch(chain(1))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(number)
    finally:
        for pipe in pipes:
            os.close(pipe)


def test_a_client_that_stops_waiting_for_a_hung_process_leaves_no_file_open(make_client):
    """The thread that sees the process off closes what it waited on, whoever still waits for it."""
    client = make_client(hang_s=1.0)
    await_state(client, "on")
    pump, number, pid = client._pump, client._pump._wake, child_of(client)
    stop(pid)
    try:
        client.close(0.1)
        assert pump._thread.is_alive()
        pump._thread.join(20.0)
        assert not pump._thread.is_alive()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    finally:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("fails", ["fill", "land"])
def test_a_copy_that_fails_costs_its_chunk_only(client, fails):
    """A bug in a copy ends as an error of that chunk: no job waits for ever, and no buffer is lost."""
    keys, slots = chain(20), Slots()
    store_chain(client, keys[:10])

    def refuse(_payload):
        raise ValueError("a bug")

    for i in range(20):
        slots.put(i, payload(i))
    if fails == "fill":
        chunks = [slots.store(key, i) for i, key in enumerate(keys[10:], 10)]
        chunks[:8] = [dataclasses.replace(chunk, fill=refuse) for chunk in chunks[:8]]
        assert client.store(1, chunks)
        (done,) = await_jobs(client)
        assert (set(done.stored), set(done.skipped)) == (set(keys[18:]), set(keys[10:18]))
        assert set(done.skipped.values()) == {"error"}
    else:
        loads = [slots.load(key, i) for i, key in enumerate(keys[:10])]
        loads[:8] = [dataclasses.replace(chunk, land=refuse) for chunk in loads[:8]]
        client.load(1, loads)
        (done,) = await_jobs(client)
        assert (set(done.landed), set(done.missed)) == (set(keys[8:10]), set(keys[:8]))
        assert set(done.missed.values()) == {"error"}
    assert client.state == "on"
    assert sorted(client._pump._free_buffers) == list(range(6))


def test_a_pump_that_cannot_watch_its_process_starts_another(make_client, monkeypatch):
    """A machine that is out of watches for a moment costs a process, not the store until the engine's end."""
    register = selectors.EpollSelector.register
    calls = []

    def refuse_one(self, file, events, data=None):
        calls.append(data)
        if len(calls) == 3:  # After the wake-up and the first channel.
            raise OSError(errno.ENOSPC, "no watches left")
        return register(self, file, events, data)

    monkeypatch.setattr(selectors.EpollSelector, "register", refuse_one)
    await_state(make_client(), "on")
