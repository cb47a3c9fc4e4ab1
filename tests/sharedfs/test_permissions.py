"""Users of one group, and containers of one host, at one root. Takes root: it becomes others."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, load, payload_of, store_chain
from tests.sharedfs.filler import FILLER_FILE_BYTES
from tests.tree.trees import in_child

REPO = Path(__file__).resolve().parents[2]
GROUP, ONE, OTHER, STRANGER = 54_000, 54_001, 54_002, 54_003


@pytest.fixture
def shared(glusterfs: None) -> Iterator[Path]:
    """Give a directory that a group may write: setgid, and reachable by everyone."""
    path = Path(tempfile.mkdtemp(prefix="prefixstore-group-"))
    os.chown(path, 0, GROUP)
    path.chmod(0o2775)
    yield path
    shutil.rmtree(path)


def as_user(uid: int, work: Callable[[], object], *, group: int = GROUP) -> None:
    """Do something as another user with another user's umask; fail if it fails."""

    def become_and_work() -> None:
        os.setgroups([group])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.umask(0o077)
        work()

    assert in_child(become_and_work) == 0


def open_shared(root: Path, **settings: object) -> PrefixStore:
    """Open a root that a group shares."""
    config = StoreConfig.from_mapping({"group_shared": True, "direct_io": "off"} | settings)
    return PrefixStore.open(
        str(root), namespace=FIELDS, config=config, index=None, background=False
    )


def test_users_of_one_group_share_a_root(shared: Path) -> None:
    """Each loads, touches, extends, pins and evicts what the other stored; nobody else can read it."""
    root, keys = shared / "root", chain("shared", 6)

    def make() -> None:
        with open_shared(root) as store:
            assert all(outcome.published for outcome in store_chain(store, keys[:3]))

    def go_on() -> None:
        with open_shared(root, touch_interval_s=0) as store:
            assert [load(store, key) for key in keys[:3]] == [payload_of(key) for key in keys[:3]]
            assert all(outcome.published for outcome in store_chain(store, keys))
            store.reconcile()
            store.touch(keys)
            store.work()
            assert store.counters()["touches"] >= 3
            assert store.counters().get("touches_failed", 0) == 0
            store.pin("shared", keys[:2])

    def evict() -> None:
        with open_shared(root, max_bytes=4 * FILE_BYTES) as store:
            report = store.evict(0)
            assert (report.evicted_chunks, report.errors) == (4, ())
            assert store.collect() is not None
            assert store.unpin("shared")
            assert store.evict(0).evicted_chunks == 2

    def look() -> None:
        with pytest.raises(PermissionError):
            next((root / "ns").iterdir())

    as_user(ONE, make)
    as_user(OTHER, go_on)
    assert {path.stat().st_gid for path in root.rglob("*")} == {GROUP}
    as_user(STRANGER, look, group=STRANGER)
    as_user(ONE, evict)
    assert list(root.rglob("*.kv")) == []


def test_a_user_who_may_only_read_is_served_quietly(shared: Path) -> None:
    """Stores are skipped and touches fail by themselves; nothing is raised, nothing is left."""
    root, keys, new = shared / "root", chain("mine", 3), chain("new", 1)
    with PrefixStore.open(str(root), namespace=FIELDS, index=None) as store:
        store_chain(store, keys)
    before = sorted(root.rglob("*"))

    def read() -> None:
        config = StoreConfig(direct_io="off", touch_interval_s=0)
        with PrefixStore.open(
            str(root), namespace=FIELDS, config=config, index=None, create=False, background=False
        ) as store:
            assert [load(store, key) for key in keys] == [payload_of(key) for key in keys]
            (outcome,) = store_chain(store, new)
            assert outcome.reason == "unavailable"
            store.touch(keys)
            store.work()

    root.chmod(0o755)
    as_user(STRANGER, read, group=STRANGER)
    assert sorted(root.rglob("*")) == before


def test_two_containers_share_a_root_and_an_index(tmp_path: Path, shared: Path) -> None:
    """Both are pid 1 of a PID namespace: neither takes the other's index, or its files for a dead one's."""
    root = tmp_path / "root"
    containers = []
    for name in ("one", "two"):
        arguments = [str(root), str(tmp_path / "index"), name, "1.5", "0", "100000"]
        command = [sys.executable, "-m", "tests.sharedfs.filler", *arguments]
        containers.append(
            subprocess.Popen(
                ["unshare", "--pid", "--fork", "--mount-proc", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=REPO,
            )
        )
    outcomes = [container.communicate(timeout=60) for container in containers]
    assert [
        (container.returncode, err)
        for container, (_, err) in zip(containers, outcomes, strict=True)
    ] == [
        (0, ""),
        (0, ""),
    ]
    said = [json.loads(out) for out, _ in outcomes]
    assert [list(each["outcomes"]) for each in said] == [["stored"], ["stored"]]
    stored = sum(each["outcomes"]["stored"] for each in said)
    assert sum(path.stat().st_size for path in root.rglob("*.kv")) == stored * FILLER_FILE_BYTES
    assert list(root.rglob("*.tmp")) == []
    assert [each["counters"]["orphans_removed"] for each in said] == [0, 0]
