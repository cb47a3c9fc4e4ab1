"""A fresh root for each test of the tree."""

from pathlib import Path

import pytest

from tests.tree.trees import Fixture


@pytest.fixture
def here(tmp_path: Path) -> Fixture:
    """Return a new root, opened."""
    return Fixture(str(tmp_path / "root"))
