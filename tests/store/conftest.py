"""Stores for the tests of the store."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS
from tests.tree.conftest import quick_path

__all__ = ["OpenStore", "open_store", "quick_path", "root"]

OpenStore = Callable[..., PrefixStore]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return the path of a root that is not made yet."""
    return str(tmp_path / "root")


@pytest.fixture
def open_store(tmp_path: Path, root: str) -> Iterator[OpenStore]:
    """Return a function that opens the root; everything opened is closed at the end.

    Without background threads unless asked for: tests say when such work happens.
    """
    with ExitStack() as opened:

        def open_it(*, config: dict[str, Any] | None = None, **arguments: Any) -> PrefixStore:
            settings = {"index_dir": str(tmp_path / "index"), "direct_io": "off", **(config or {})}
            arguments.setdefault("namespace", FIELDS)
            arguments.setdefault("background", False)
            store = PrefixStore.open(root, config=StoreConfig.from_mapping(settings), **arguments)
            return opened.enter_context(store)

        yield open_it
