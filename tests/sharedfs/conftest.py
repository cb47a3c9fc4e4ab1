"""A plain directory, two mounts of a GlusterFS volume, and two that cache for half a minute."""

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.sharedfs.gluster import Volume, prepare
from tests.sharedfs.hosts import Hosts

CACHE_S = 30.0
CACHED = tuple(f"--{what}-timeout={CACHE_S:.0f}" for what in ("attribute", "entry", "negative"))
"""What an NFS client does by default, and for longer: it believes names, attributes and absences."""
KINDS = ("directory", "glusterfs", "glusterfs-cached")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here; a hung mount ends the run rather than hold it up."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sharedfs)
            # Mounts in real time: one more try, as in tests/vllm.
            item.add_marker(pytest.mark.flaky(reruns=1))
            # By a thread: a main thread that hangs in a system call takes no signal.
            item.add_marker(pytest.mark.timeout(120, method="thread"))


@pytest.fixture(scope="session")
def glusterfs() -> None:
    """See that a volume can be made on this machine."""
    prepare()


@pytest.fixture(scope="session")
def volume(glusterfs: None) -> Iterator[Volume]:
    """Give a volume with four mounts, of which two cache; tests share it and leave it whole."""
    with closing(Volume()) as volume:
        volume.start()
        for name in ("a", "b"):
            volume.mount(name)
            volume.mount(f"{name}-cached", CACHED)
        yield volume


@pytest.fixture
def own_volume(glusterfs: None) -> Iterator[Volume]:
    """Give a volume without mounts, for a test that hangs or breaks what it has."""
    with closing(Volume()) as volume:
        volume.start()
        yield volume


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosts]:
    """Give a root, not made yet, on what the test is run for."""
    kind = request.param
    if kind == "directory":
        root = tmp_path / "root"
        hosts = Hosts(a=root, b=root, disk=root)
    else:
        volume = request.getfixturevalue("volume")
        is_cached = kind == "glusterfs-cached"
        names = ("a-cached", "b-cached") if is_cached else ("a", "b")
        name = f"root-{uuid.uuid4().hex[:8]}"
        a, b = (volume.directory / mount / name for mount in names)
        cache_s = CACHE_S if is_cached else 1.0
        hosts = Hosts(a, b, volume.brick / name, cache_s=cache_s, volume=volume, names=names)
    with hosts.opened:
        yield hosts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of two hosts on everything there is, unless it says on what."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "hosts" in metafunc.fixturenames and "hosts" not in named:
        metafunc.parametrize("hosts", KINDS, indirect=True)
