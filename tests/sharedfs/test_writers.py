"""Orphans on a shared filesystem: what the dead left goes, what the living have not published stays."""

import threading
from concurrent.futures import ThreadPoolExecutor

from prefixstore.testing.chains import chain, chunk_at, load, payload_of, store_chain
from prefixstore.testing.faults import Call, FaultyOs, Hang, Kill, When
from prefixstore.tree.osfs import RealOs
from prefixstore.tree.writers import PRESUMED_DEAD_S, WriterDocument, Writers, this_process
from tests.sharedfs.hosts import Hosts, until
from tests.tree.trees import KILLED, in_child

TEMPORARIES = "ns/**/.*.tmp"


def is_blob_write(call: Call) -> bool:
    """Whether a call writes a blob's bytes."""
    return call.name == "write_from" and "/ns/" in call.path and "manifest" not in call.path


def test_what_a_killed_writer_left_is_reaped_from_the_other_mount(hosts: Hosts) -> None:
    """Its process is gone, which anyone on its machine can see, whatever mount was used."""
    (key,) = keys = chain("orphan", 1)
    b = hosts.store_on(hosts.b)

    def die_writing() -> None:
        calls = FaultyOs(RealOs(), When(fault=Kill(share=0.5), matches=is_blob_write))
        hosts.store_on(hosts.a, os_calls=calls).store(chunk_at(keys, 0), payload_of(key))

    assert in_child(die_writing) == KILLED
    assert len(hosts.files(TEMPORARIES)) == 1

    def reaped() -> bool:
        b._parts.membership.reap()
        return hosts.files(TEMPORARIES) == []

    until(reaped, within_s=hosts.fresh_s)
    assert load(b, key) == "absent"


def test_what_a_live_writer_has_not_published_stays(hosts: Hosts) -> None:
    """A store that takes its time on one mount ends well, however often the other reaps."""
    (key,) = keys = chain("slow", 1)
    gate = threading.Event()
    calls = FaultyOs(
        RealOs(), When(fault=Hang(gate), name="link", matches=lambda c: ".kv" in c.path)
    )
    a, b = hosts.store_on(hosts.a, os_calls=calls), hosts.store_on(hosts.b)
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(a.store, chunk_at(keys, 0), payload_of(key))
        until(lambda: len(hosts.files(TEMPORARIES)) == 1, within_s=10)
        for _ in range(3):
            b._parts.membership.reap()
        assert len(hosts.files(TEMPORARIES)) == 1
        gate.set()
        assert storing.result(30).published
    assert hosts.files(TEMPORARIES) == []
    until(lambda: load(b, key) == payload_of(key), within_s=hosts.fresh_s)


def test_a_writer_of_another_machine_is_dead_after_a_day_of_silence(hosts: Hosts) -> None:
    """By the server's clock, read off a file; before that its files stay, since nobody can tell."""
    a, b = hosts.store_on(hosts.a), hosts.store_on(hosts.b)
    store_chain(a, chain("any", 1))
    foreign = WriterDocument(
        host="elsewhere", boot_id="1", pid=1, pid_namespace="pid:[1]", started="1"
    )
    Writers(a.root, this=foreign).register("f" * 32)
    (leaf,) = hosts.files("ns/*/??/??")
    orphan = hosts.a / leaf.relative_to(hosts.disk) / f".{'f' * 32}.1.tmp"
    orphan.write_bytes(b"half")
    now_s = orphan.stat().st_mtime
    reaper = Writers(b.root, this=this_process())

    reaper.reap(server_now_s=now_s + PRESUMED_DEAD_S / 2, spare=b.tree.writer)
    assert len(hosts.files(TEMPORARIES)) == 1

    def reaped() -> bool:
        reaper.reap(server_now_s=now_s + PRESUMED_DEAD_S + 60, spare=b.tree.writer)
        return hosts.files(TEMPORARIES) == []

    until(reaped, within_s=hosts.fresh_s)
    assert hosts.files("writers/*.json") != []
