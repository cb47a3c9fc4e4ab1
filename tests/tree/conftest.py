"""A fresh root for each test of the tree."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree.trees import Fixture

MEMORY = Path("/dev/shm")


@pytest.fixture
def here(tmp_path: Path) -> Fixture:
    """Return a new root, opened."""
    return Fixture(str(tmp_path / "root"))


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """Return a directory in memory, for sweeps that make and remove thousands of roots.

    Removing one directory takes a loaded disk milliseconds; what is tested is above the filesystem.
    """
    if not MEMORY.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="prefixstore-test-", dir=MEMORY))
    yield path
    shutil.rmtree(path)
