"""Settings of all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# A loaded machine is no failure: the hang timeout of pytest is the limit that counts.
settings.register_profile("prefixstore", deadline=None)
settings.load_profile("prefixstore")

ONE_AT_A_TIME = ("browser", "sharedfs", "vllm")
"""Directories whose tests share mounts, a browser or an engine's memory: each on one process of several."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what takes turns together where tests run on several processes (``-n 2 --dist loadgroup``)."""
    here = Path(__file__).parent
    for item in items:
        part = item.path.relative_to(here).parts[0]
        if part in ONE_AT_A_TIME:
            item.add_marker(pytest.mark.xdist_group(part))
