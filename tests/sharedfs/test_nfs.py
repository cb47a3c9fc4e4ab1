"""The seam's contract over NFS version 3, and a store on it: two clients of a real server are two hosts."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, load, payload_of, store_chain
from prefixstore.testing.os_contract import OsContract
from tests.sharedfs.gluster import REPO, SETUP_S
from tests.sharedfs.nfs import NfsOs, Server, is_installed


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Give a server; tests share it."""
    if os.geteuid() == 0 and not is_installed():
        setup = [REPO / "tools" / "sharedfs-setup"]
        subprocess.run(setup, check=True, timeout=SETUP_S)
    if not is_installed():
        pytest.skip("no NFS server can be had here; it also takes root")
    with closing(Server()) as server:
        server.start()
        yield server


@pytest.fixture
def a(server: Server) -> Iterator[NfsOs]:
    """Give a host."""
    host = server.client()
    yield host
    host.close_connection()


@pytest.fixture
def b(server: Server) -> Iterator[NfsOs]:
    """Give another host."""
    host = server.client()
    yield host
    host.close_connection()


@pytest.fixture
def directory(a: NfsOs, request: pytest.FixtureRequest) -> str:
    """Make a directory of the test's own."""
    path = f"/{request.node.name}"
    a.make_directory(path)
    return path


class TestNfs(OsContract):
    """The contract, with the fixtures above."""


def open_on(host: NfsOs, directory: str, **config: object) -> PrefixStore:
    """Open a root as one host, with an index of its own in memory."""
    return PrefixStore.open(
        f"{directory}/root",
        namespace=FIELDS,
        config=StoreConfig.from_mapping({"direct_io": "off", "miss_ttl_s": 0, **config}),
        index=None,
        background=False,
        os_calls=host,
    )


def test_two_stores_share_a_root_over_nfs(a: NfsOs, b: NfsOs, directory: str) -> None:
    """What one publishes the other finds and loads; pins hold on both, and what goes is gone for both."""
    keys = chain("nfs", 20)
    with open_on(a, directory) as one, open_on(b, directory) as other:
        assert other.longest_prefix(keys) == 0
        assert all(outcome.published for outcome in store_chain(one, keys))
        assert all(outcome.existed for outcome in store_chain(other, keys[:5]))
        assert other.longest_prefix(keys) == len(keys)
        assert [load(other, key) for key in keys] == [payload_of(key) for key in keys]

        one.pin("system", keys[:8])
        report = other.evict(5 * FILE_BYTES)
        assert (report.evicted_chunks, report.errors) == (12, ())
        assert [load(one, key) for key in keys[:8]] == [payload_of(key) for key in keys[:8]]
        assert load(one, keys[8]) == "absent"
        one.touch(keys)
        one.work()
        other.reconcile()
        assert other.stats().chunks == 8


@pytest.mark.parametrize("durability", ["data", "full"])
def test_durable_stores_over_nfs(a: NfsOs, directory: str, durability: str) -> None:
    """Syncs reach the server."""
    keys = chain(durability, 3)
    with open_on(a, directory, durability=durability) as store:
        outcomes = store_chain(store, keys)
        assert [outcome.detail for outcome in outcomes] == [""] * 3
        assert [load(store, key) for key in keys] == [payload_of(key) for key in keys]
