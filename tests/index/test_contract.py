"""Both indexes keep the contract."""

from contextlib import closing

import pytest

from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.testing.index_contract import IndexContract


class TestMemoryIndex(IndexContract):
    @pytest.fixture
    def index(self):
        with closing(MemoryIndex()) as index:
            yield index


class TestLmdbIndex(IndexContract):
    @pytest.fixture
    def index(self, tmp_path):
        with LmdbIndex.open(tmp_path, store_id="a-store") as index:
            yield index
