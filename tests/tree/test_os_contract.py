"""The machine's filesystem keeps the seam's contract."""

from pathlib import Path

import pytest

from prefixstore.testing.os_contract import OsContract
from prefixstore.tree.osfs import Os, RealOs


class TestRealOs(OsContract):
    @pytest.fixture
    def a(self) -> Os:
        return RealOs()

    @pytest.fixture
    def b(self) -> Os:
        return RealOs()

    @pytest.fixture
    def directory(self, tmp_path: Path) -> str:
        return str(tmp_path)
