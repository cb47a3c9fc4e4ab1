"""Who is told what a worker of the direct path did."""

from typing import Protocol

__all__ = ["Observer"]


class Observer(Protocol):
    """Who counts what happened. Reasons are metric labels."""

    def missed(self, reason: str, chunks: int = 1) -> None:
        """Count chunks that a lookup had found and that were not loaded."""
        ...

    def skipped(self, reason: str, chunks: int = 1) -> None:
        """Count chunks that were offered and not stored."""
        ...

    def moved(self, *, loaded_bytes: int = 0, stored_bytes: int = 0) -> None:
        """Count bytes that came from the store and that went there."""
        ...
