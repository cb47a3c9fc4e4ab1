"""Two hosts that share one root, as tests see them: two paths to the same files, two stores.

Everything runs in one process or its children; what makes two hosts of them is that each has a mount,
an index and a writer of its own.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS
from tests.sharedfs.gluster import Volume

__all__ = ["Hosts", "until"]

FRESH_S = 2.0
"""A chunk that one host published is found by another within this, caches of the mount aside."""


@dataclass
class Hosts:
    """A root that two hosts have mounted.

    Attributes:
        a: The root's path on the first host.
        b: Its path on the second; for a plain directory the same.
        disk: Its path on the server's own disk, past all caches.
        cache_s: How long a host may believe what it has seen once.
        volume: The volume that is mounted; None for a plain directory.
        names: The mounts' names in ``volume``.
    """

    a: Path
    b: Path
    disk: Path
    cache_s: float = 0.0
    volume: Volume | None = None
    names: tuple[str, str] = ("a", "b")
    opened: ExitStack = field(default_factory=ExitStack)

    @property
    def fresh_s(self) -> float:
        """Within what time one host sees what another did."""
        return FRESH_S + self.cache_s

    def store_on(
        self, root: Path, *, config: dict[str, Any] | None = None, **arguments: Any
    ) -> PrefixStore:
        """Open the root as one of the hosts, with an index of its own in memory; closed at the end."""
        arguments = {"namespace": FIELDS, "index": None, "background": False} | arguments
        settings = StoreConfig.from_mapping(config or {})
        return self.opened.enter_context(PrefixStore.open(str(root), config=settings, **arguments))

    def files(self, pattern: str) -> list[Path]:
        """Return files of the root on the server's disk."""
        return sorted(self.disk.glob(pattern))

    def file_of(self, key: Key) -> Path:
        """Return where a blob lies on the server's disk."""
        (namespace,) = self.disk.glob("ns/*")
        digits = key.hex()
        return namespace / digits[:2] / digits[2:4] / f"{digits}.kv"


def until(condition: Callable[[], bool], *, within_s: float) -> float:
    """Wait until ``condition`` holds; return how long that took, or fail."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < within_s, f"not within {within_s} s"
        time.sleep(0.01)
    return time.monotonic() - start_s
