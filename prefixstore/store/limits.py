"""What a store keeps to: the limits of the root, and those of its own settings; the tighter of each.

The root's document is what all hosts agree on. It is looked at again now and then, so a running engine
follows a change. A document that cannot be read or understood is an error for whoever asks: stores stop
until it is mended, since a limit that is not understood cannot be kept; loads do not ask. A root that does
not say whether it has one counts like that, too, unless it has said so before: one that goes away later
keeps the limits that it had.
"""

import logging
import threading
from dataclasses import dataclass, replace
from typing import TypeAlias

from prefixstore.clock import Clock
from prefixstore.config import StoreConfig
from prefixstore.errors import PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.tree.limits import LimitsDocument, read_limits
from prefixstore.tree.root import Root
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["Limits", "LimitsBook"]

LOG = logging.getLogger(__name__)

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


Identity: TypeAlias = tuple[int, float, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What was seen of the root's document; replaced whole.

    Attributes:
        limits: In force by the document understood last, or by none.
        identity: Which document that was; None if there was none.
        answered: The root has shown its document, or that it has none.
        trouble: Why what is there now is not understood.
    """

    limits: Limits
    identity: Identity | None = None
    answered: bool = True
    trouble: PrefixStoreError | None = None


class LimitsBook:
    """The limits in force, followed. Safe for concurrent use; its lock is a leaf, held for no I/O."""

    def __init__(self, root: Root, *, config: StoreConfig, clock: Clock) -> None:
        self._root = root
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._look_at_s = float("-inf")
        self._has_looked = False
        self._view = _View(limits=self._merged(None), answered=False)

    def current(self) -> Limits:
        """Return the limits in force.

        Raises:
            InvalidError: The root's document is damaged, or of a later version.
            UnavailableError: It cannot be read, or nobody can tell whether there is one.
        """
        with self._lock:
            now_s = self._clock.monotonic_s()
            # Who asks while the first look is under way looks, too: nothing is known yet.
            is_due = now_s >= self._look_at_s or not self._has_looked
            if is_due:
                self._look_at_s = now_s + LOOK_S
        if is_due:
            self._look()
        view = self._view
        if view.trouble is not None:
            # It is raised again and again, and would keep the frames of each time.
            raise view.trouble.with_traceback(None)
        return view.limits

    def known(self) -> Limits:
        """Return the limits last understood, for whoever has no use for an error."""
        try:
            return self.current()
        except PrefixStoreError:
            return self._view.limits

    def forget(self) -> None:
        """Look again at the next question."""
        with self._lock:
            self._look_at_s = float("-inf")

    def _look(self) -> None:
        before = self._view
        view = self._seen(before)
        if view.trouble is not None and str(view.trouble) != str(before.trouble):
            LOG.warning("prefixstore stores nothing until it knows its limits: %s", view.trouble)
        self._view = view
        self._has_looked = True

    def _seen(self, before: _View) -> _View:
        """Look at the document; return what is known after that."""
        path = self._root.layout.limits
        try:
            stat = self._root.os_calls.stat(path)
        except OSError as error:
            if is_missing(error):
                return before if self._is_away(before) else _View(limits=self._merged(None))
            if before.answered:
                return before  # A root that does not answer has the limits that it had.
            return replace(before, trouble=translate(error, doing="look at", path=path))
        identity = (stat.inode, stat.modified_s, stat.size_bytes)
        if identity == before.identity:
            return replace(before, trouble=None)
        try:
            document = read_limits(self._root)
        except PrefixStoreError as error:
            # It is there, and not the one that is known: what it says must not be passed over.
            return replace(before, answered=True, trouble=error)
        return _View(limits=self._merged(document), identity=None if document is None else identity)

    def _is_away(self, before: _View) -> bool:
        """Whether the root itself is missing, and not just the limits that it had."""
        if before.identity is None:
            return False
        try:
            self._root.os_calls.stat(self._root.layout.store)
        except OSError:
            return True
        return False

    def _merged(self, document: LimitsDocument | None) -> Limits:
        config, found = self._config, document or LimitsDocument()
        quotas = [each for each in (config.max_bytes, found.max_bytes) if each is not None]
        return Limits(
            max_bytes=min(quotas, default=None),
            min_free_bytes=max(config.min_free_bytes, found.min_free_bytes),
            max_age_s=found.max_age_s,
            namespaces=found.of_namespaces(),
        )
