"""What happened since the store was opened, counted; a snapshot is a plain value.

Each thread of the caller adds under one lock, held for one dictionary update. Names are stable: they
become metric labels.
"""

import threading
from collections import Counter

__all__ = ["Counters"]


class Counters:
    """Named sums; safe for concurrent use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()

    def add(self, **amounts: int) -> None:
        """Add ``amounts`` by name, all of them or none."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def snapshot(self) -> dict[str, int]:
        """Return all sums, consistent with each other."""
        with self._lock:
            return dict(self._sums)
