"""What a root needs whether or not anyone stores into it: pins, eviction, a true index, figures.

``PrefixStore`` is this and the chunks of one namespace.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from prefixstore.config import StoreConfig
from prefixstore.errors import ClosedError, InvalidError, PrefixStoreError
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.collector import Collector
from prefixstore.store.evictor import Evictor
from prefixstore.store.hints import Hints
from prefixstore.store.keeper import Keeper
from prefixstore.store.limits import Limits
from prefixstore.store.parts import Parts
from prefixstore.store.reconcile import COMPLETE_MARK, ReconcileReport
from prefixstore.store.values import EvictionReport, NamespaceStats, StoreStats
from prefixstore.tree.blobs import BlobTree
from prefixstore.tree.pins import Pin
from prefixstore.tree.root import Root
from prefixstore.tree.writers import Reaped

__all__ = ["Upkeep", "without_namespace"]

CLOSE_S = 5.0
"""How long closing waits for each background thread: they end between two directories or victims, so a
longer wait is a hung mount, and they are left to die with the process."""


class Upkeep:
    """One opened root. Safe for concurrent use by threads; see ``PrefixStore``.

    Attributes:
        namespace: The id of the namespace that loads and stores go to; None without one.
    """

    def __init__(self, parts: Parts, *, namespace: NamespaceId | None) -> None:
        self.namespace = namespace
        self._parts = parts
        self._closed = False
        self._keeper: Keeper | None = None
        if namespace is not None:
            self._keeper = Keeper(parts, namespace=namespace)
        self._evictor = Evictor(parts, namespace=namespace, keeper=self._keeper)
        self._collector = Collector(parts, self._evictor)

    @property
    def root(self) -> Root:
        """The opened root."""
        return self._parts.root

    @property
    def config(self) -> StoreConfig:
        """The settings."""
        return self._parts.config

    @property
    def read_only(self) -> bool:
        """Whether this store only serves."""
        return self._parts.config.read_only

    @property
    def tree(self) -> BlobTree:
        """The truth, for maintenance."""
        return self._parts.tree

    @property
    def hints(self) -> Hints:
        """The index, for maintenance."""
        return self._parts.hints

    # Pins.

    def pin(
        self,
        name: str,
        keys: Sequence[Key],
        *,
        namespace: NamespaceId | None = None,
        ends_at_s: int | None = None,
    ) -> Pin:
        """Keep chunks of one namespace from eviction, by name and on every host.

        Replaces the pin of that name. Chunks need not be stored yet. Durable on return.

        Args:
            name: Letters, digits, dots, dashes and underscores.
            keys: What to keep; a whole chain, or eviction may take its beginning only after its end.
            namespace: Where they belong; the store's own namespace if None.
            ends_at_s: When the pin ends by itself, in seconds since the epoch; None for never.

        Raises:
            InvalidError: The name or the keys cannot be pinned.
            FullError, UnavailableError: The pin was not written.
        """
        self._check_open()
        where = namespace or self.namespace
        if where is None:
            raise without_namespace("pin")
        if self.read_only:
            raise InvalidError(f"{self.root.path} was opened read-only: it pins nothing")
        pin = Pin(
            name=name,
            namespace=where,
            keys=tuple(keys),
            created_s=self.server_now_s(),
            ends_at_s=ends_at_s,
        )
        self._parts.pins.files.write(pin)
        self._count_pins()
        return pin

    def unpin(self, name: str) -> bool:
        """Remove a pin; return whether there was one.

        Raises:
            InvalidError: The name cannot be a pin's.
            UnavailableError: It could not be removed.
        """
        self._check_open()
        removed = self._parts.pins.files.remove(name)
        self._count_pins()
        return removed

    def pins(self) -> list[Pin]:
        """Return all pins of the root, of every namespace, ended ones included.

        Raises:
            InvalidError: A pin's file is damaged.
            UnavailableError: They cannot be read.
        """
        self._check_open()
        return list(self._parts.pins.files)

    def server_now_s(self) -> int:
        """Return whole seconds since the epoch by the file server's clock, which ends of pins are told in.

        A store that may write learns it from the server; one that only serves has this host's clock.
        """
        self._check_open()
        if not self.read_only:
            with contextlib.suppress(PrefixStoreError):
                self._parts.membership.announce()
        return self._parts.membership.now_s()

    # The root as a whole.

    def evict(
        self,
        max_bytes: int | None = None,
        *,
        max_age_s: float | None = None,
        dry_run: bool = False,
        scan: bool = True,
    ) -> EvictionReport:
        """Remove what was not used for longest, of all namespaces and writers, leaves first.

        Args:
            max_bytes: How much may stay; None for the limits of the root and the settings.
            max_age_s: Remove what was not used for so long, too; None for no such limit. Given alone it
                is the only limit.
            dry_run: Tell what would be removed, remove nothing.
            scan: Compare the index with the tree first. False trusts the index, which is right only
                just after a scan.

        Returns:
            What was done; errors are told in it, not raised.

        Raises:
            InvalidError: The store is read-only, there is no limit at all, or it is the root's and cannot be
                understood.
            UnavailableError: It is the root's and cannot be read.
        """
        self._check_open()
        if self.read_only and not dry_run:
            raise InvalidError(f"{self.root.path} was opened read-only: it evicts nothing")
        # Who gives limits goes by those alone, and need not know the root's.
        limits = self.limits() if max_bytes is None and max_age_s is None else None
        if limits is not None and not limits.any:
            raise InvalidError(
                "evict needs a limit: max_bytes, max_age_s, or limits of the root or in the settings"
            )
        return self._evictor.evict(
            self._target(max_bytes, only_age=max_age_s is not None),
            namespace_bytes=(lambda _: {})
            if limits is None
            else self._parts.space.namespace_targets,
            max_age_s=max_age_s if limits is None else limits.max_age_s,
            dry_run=dry_run,
            scan=scan,
        )

    def collect(
        self,
        *,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> EvictionReport | None:
        """Do once what a collector does: reap orphans, and evict by the limits, with the lease.

        Args:
            max_bytes: How much may stay; None for the limits of the root and the settings, by which
                nothing goes below the high watermark.
            max_age_s: What nobody used for so long goes; None for the root's limit.
            stop: Asked at each directory and each batch of victims; True ends the pass. It may wait.

        Returns:
            What went; None while another host evicts.

        Raises:
            InvalidError: The store is read-only, or the root's limits cannot be understood.
            PrefixStoreError: The root cannot be reached.
        """
        self._check_open()
        if self.read_only:
            raise InvalidError(f"{self.root.path} was opened read-only: it evicts nothing")
        self.limits()
        return self._collector.make_pass(stop=stop, target_bytes=max_bytes, max_age_s=max_age_s)

    def limits(self) -> Limits:
        """Return the limits in force: the root's and those of the settings, the tighter of each.

        Raises:
            InvalidError: The root's limits cannot be understood.
            UnavailableError: They cannot be read.
        """
        return self._parts.limits.current()

    def remove(
        self, keys: Sequence[Key], *, namespace: NamespaceId | None = None, dry_run: bool = False
    ) -> EvictionReport:
        """Remove single chunks, whatever they are parents of; pinned ones stay.

        Args:
            keys: What to remove.
            namespace: Where; the store's own namespace if None.
            dry_run: Tell what would be removed, remove nothing.

        Raises:
            InvalidError: The store is read-only, has no namespace, or a pin is damaged.
            UnavailableError: The pins cannot be read.
        """
        self._check_open()
        where = namespace or self.namespace
        if where is None:
            raise without_namespace("remove")
        if self.read_only and not dry_run:
            raise InvalidError(f"{self.root.path} was opened read-only: it removes nothing")
        return self._evictor.remove(where, keys, dry_run=dry_run)

    def reconcile(self) -> ReconcileReport:
        """Bring the index in line with the tree, now, in this thread; ends early when closed."""
        self._check_open()
        report = self._evictor.reconcile(stop=lambda: self._collector.closing)
        self._count_pins()
        return report

    def check_whole(self) -> None:
        """Refuse to answer for all of the root from an index that does not hold all that ``reconcile`` has met.

        Raises:
            InvalidError: It had no room for all of it.
            UnavailableError: It was cleared or has failed since.
        """
        self._check_open()
        self._evictor.check_whole()

    def reap(self, *, dry_run: bool = False) -> Reaped:
        """Remove what dead writers left behind, looked for in every directory.

        Args:
            dry_run: Tell what would be removed, remove nothing.

        Raises:
            InvalidError: The store is read-only.
            FullError, UnavailableError: The root cannot be written or listed.
        """
        self._check_open()
        if self.read_only and not dry_run:
            raise InvalidError(f"{self.root.path} was opened read-only: it reaps nothing")
        return self._parts.membership.reap_thoroughly(dry_run=dry_run)

    def rebuild(self) -> None:
        """Forget the index and build it anew from the tree, in the background, while serving."""
        self._check_open()
        self._flush()
        self.hints.clear()
        self._collector.want_rebuild()

    def work(self) -> None:
        """Do what waits for the background, now and in this thread: rows, touches, evictions asked for."""
        self._check_open()
        if self._keeper is not None:
            self._keeper.work()
        self._collector.work()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no rebuild or eviction is under way; return whether that came to pass."""
        return self._collector.wait_idle(timeout_s)

    def stats(self) -> StoreStats:
        """Return what the index knows of the root, and what this process has done."""
        self._check_open()
        self._flush()
        totals = self.hints.totals()
        return StoreStats(
            chunks=sum(t.chunks for t in totals.values()),
            file_bytes=sum(t.file_bytes for t in totals.values()),
            namespaces=tuple(
                NamespaceStats(namespace=namespace, chunks=t.chunks, file_bytes=t.file_bytes)
                for namespace, t in sorted(totals.items())
            ),
            complete=self.hints.mark(COMPLETE_MARK) is not None and not self.hints.has_forgotten,
            index_kind=self.hints.kind,
            counters=self.counters(),
        )

    def counters(self) -> dict[str, int]:
        """Return what this process has done with the store since it was opened, by name."""
        counters = self._parts.counters.snapshot()
        counters["index_failures"] = self.hints.failures
        return counters

    # Its end.

    def close(self) -> None:
        """Write what waits, end the background threads, let go of the index; bounded, idempotent."""
        if self._closed:
            return
        self._closed = True
        self._collector.close(timeout_s=CLOSE_S)
        if self._keeper is not None:
            self._keeper.close(timeout_s=CLOSE_S)
        self._parts.membership.leave()
        self.hints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    # Inside.

    def _target(self, max_bytes: int | None, *, only_age: bool) -> Callable[[int], int]:
        if max_bytes is not None:
            return lambda _used_bytes: max_bytes
        if only_age:
            return lambda used_bytes: used_bytes
        return lambda used_bytes: self._parts.space.target_bytes(used_bytes, full=False)

    def _flush(self) -> None:
        """Have the index know what this process has done until now."""
        if self._keeper is not None:
            self._keeper.flush()

    def _count_pins(self) -> None:
        """Have the index follow the pin files; eviction reads them again in any case."""
        with contextlib.suppress(PrefixStoreError):
            self.hints.set_pins(self._parts.pins.held(now_s=self._parts.membership.now_s()))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store at {self.root.path} was closed")


def without_namespace(verb: str) -> InvalidError:
    """Return the error of a call that needs a namespace on a store that has none."""
    return InvalidError(f"this store was opened without a namespace: it cannot {verb}")
