"""What a store keeps to: the limits of the root, and those of its own settings; the tighter of each.

The root's document is what all hosts agree on. It is looked at again now and then, so a running engine
follows a change. A document that cannot be understood is an error for whoever asks: stores stop until it
is mended, since a limit that is not understood cannot be kept; loads do not ask.
"""

import threading
from dataclasses import dataclass

from prefixstore.clock import Clock
from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.tree.limits import LimitsDocument, read_limits
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing

__all__ = ["Limits", "LimitsBook"]

LOOK_S = 10.0
"""How late a running engine follows a change of the root's limits: one stat in this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits in force.

    Attributes:
        max_bytes: What all blobs may take; None for no such limit.
        min_free_bytes: What the filesystem must have free; 0 for no such floor.
        max_age_s: Chunks that nobody used for so long go; None for no such limit.
        namespaces: What the blobs of single namespaces may take.
    """

    max_bytes: int | None = None
    min_free_bytes: int = 0
    max_age_s: float | None = None
    namespaces: dict[NamespaceId, int]

    @property
    def bounded(self) -> bool:
        """Whether bytes are counted: there is a quota of any kind."""
        return self.max_bytes is not None or bool(self.namespaces)

    @property
    def counts(self) -> bool:
        """Whether hosts tell each other what they store, remove and have looked at."""
        return self.bounded or self.max_age_s is not None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self.bounded or self.min_free_bytes > 0 or self.max_age_s is not None


class LimitsBook:
    """The limits in force, followed. Safe for concurrent use; its lock is a leaf, held for no I/O."""

    def __init__(self, root: Root, *, config: StoreConfig, clock: Clock) -> None:
        self._root = root
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._look_at_s = float("-inf")
        self._identity: tuple[int, float, int] | None = None
        self._trouble: InvalidError | None = None
        self._limits = self._merged(None)

    def current(self) -> Limits:
        """Return the limits in force.

        Raises:
            InvalidError: The root's document is damaged, or of a later version.
        """
        with self._lock:
            now_s = self._clock.monotonic_s()
            is_due = now_s >= self._look_at_s
            if is_due:
                self._look_at_s = now_s + LOOK_S
        if is_due:
            self._look()
        if self._trouble is not None:
            raise self._trouble
        return self._limits

    def known(self) -> Limits:
        """Return the limits last understood, for whoever has no use for an error."""
        try:
            return self.current()
        except InvalidError:
            return self._limits

    def forget(self) -> None:
        """Look again at the next question."""
        with self._lock:
            self._look_at_s = float("-inf")

    def _look(self) -> None:
        try:
            stat = self._root.os_calls.stat(self._root.layout.limits)
            identity = (stat.inode, stat.modified_s, stat.size_bytes)
            if identity == self._identity:
                return
            document = read_limits(self._root)
        except InvalidError as error:
            self._trouble = error
            return
        except (PrefixStoreError, OSError) as error:
            if not (isinstance(error, OSError) and is_missing(error)):
                return  # A root that does not answer has the limits that it had.
            identity, document = None, None
        self._identity, self._trouble = identity, None
        self._limits = self._merged(document)

    def _merged(self, document: LimitsDocument | None) -> Limits:
        config, found = self._config, document or LimitsDocument()
        quotas = [each for each in (config.max_bytes, found.max_bytes) if each is not None]
        return Limits(
            max_bytes=min(quotas, default=None),
            min_free_bytes=max(config.min_free_bytes, found.min_free_bytes),
            max_age_s=found.max_age_s,
            namespaces=found.of_namespaces(),
        )
