"""The collector's lease: of the hosts that share a root, one evicts at a time. By files alone.

    collector/<epoch>.json   an epoch that is held; names its holder. Its time changes with each beat
    collector/<epoch>.done   one that its holder has ended

An epoch is won by making its file where none is, which a filesystem grants to one host only; it is never
broken, only followed by the next. Who holds one touches its file now and then. Whoever sees the newest
file unchanged for ``PATIENCE_S`` by its own clock wins the next epoch, if it is the first to make it. No
clocks are compared, and no locks are used: on some mounts those are granted to everybody.

What the lease is for, and what not: two evictions at once cost each host a scan of the tree and nothing
else, since removing a blob twice is removing it once. So a doubt never stops an eviction. A holder that
was paused and followed meanwhile finds that out at its next beat, and what it removes until then is gone
for a reason that was good when it was paused: at worst a miss. A full disk, on which no epoch can be made,
has to be evicted from all the same: errors are the caller's to ignore.
"""

import re
from dataclasses import dataclass

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.policy.lease import Sight, Watch, claimable, observe
from prefixstore.tree.documents import put_document, read_document
from prefixstore.tree.root import Root
from prefixstore.tree.scan import names_in
from prefixstore.tree.trouble import is_absence, translate

__all__ = ["BEAT_S", "PATIENCE_S", "Lease"]

BEAT_S = 10.0
"""How often a holder shows that it goes on: one metadata write."""
PATIENCE_S = 120.0
"""How long a challenger looks at an unchanged beat. NFS may show a file's old time for a minute by default
(acregmax), and a beat may be late. Shorter makes two collectors now and then; longer is for how long a
root at its quota stores nothing after its collector's host has died."""
EPOCHS_KEPT = 64
"""Epochs that stay. A host whose view of the directory is old then tries to make one that is there, and
fails; its view would have to be 64 evictions old to make one that was removed."""

_NAME = re.compile(r"([0-9a-f]{16})\.(json|done)")


class EpochDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``collector/<epoch>.json``."""

    holder: str
    """The id of the writer that won it: 32 hex digits, never used twice."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A file of the lease; sorts by epoch, and a released epoch after the same one held."""

    epoch: int
    released: bool


class Lease:
    """One host's part in the lease of a root. Not thread-safe: for the one thread that evicts.

    Attributes:
        epoch: The epoch that this host holds, as far as it knows; 0 for none.
    """

    def __init__(
        self,
        root: Root,
        *,
        holder: str,
        clock: Clock,
        patience_s: float = PATIENCE_S,
        directory: str | None = None,
    ) -> None:
        """Take part in a lease.

        Args:
            root: The root.
            holder: The id of the writer that wants it.
            clock: Its clock.
            patience_s: How long to look at an unchanged beat.
            directory: Where the epochs lie: a lease of its own; None for the collector's.
        """
        self.epoch = 0
        self._root = root
        self._os = root.os_calls
        self._directory = directory or root.layout.collector
        self._holder = holder
        self._clock = clock
        self._patience_s = patience_s
        self._watch: Watch | None = None
        self._beat_at_s = 0.0

    def acquire(self) -> bool:
        """Look once, and try once to win the lease if it is free; return whether this host holds it.

        Never waits: to be told of a holder that died, ask again within a few beats.

        Raises:
            FullError, UnavailableError: Nobody can say, or no epoch can be made.
        """
        epoch = claimable(
            self._look(), now_s=self._clock.monotonic_s(), patience_s=self._patience_s
        )
        if epoch is None:
            return False
        try:
            self._root.ensure_directory(self._directory)
        except OSError as error:
            raise translate(error, doing="make", path=self._directory) from error
        put_document(
            self._path(epoch),
            EpochDocument(holder=self._holder),
            os_calls=self._os,
            mode=self._root.document_mode,
        )
        if not self._is_mine(self._look().sight, epoch):
            return False
        self.epoch = epoch
        self._beat_at_s = self._clock.monotonic_s() + BEAT_S
        self._forget_old(epoch)
        return True

    def renew(self) -> bool:
        """Beat if it is time; return False once another host has followed.

        Costs nothing between two beats, so it may be asked before every step of an eviction. What
        cannot be told counts as True: nothing is at stake but work done twice.
        """
        if not self.epoch:
            return False
        if self._clock.monotonic_s() < self._beat_at_s:
            return True
        self._beat_at_s = self._clock.monotonic_s() + BEAT_S
        try:
            if not self._is_mine(self._look().sight, self.epoch):
                self.epoch = 0
                return False
            self._os.touch(self._path(self.epoch))
        except (PrefixStoreError, OSError):
            return True
        return True

    def server_now_s(self) -> float:
        """Beat, and return the time by the file server's clock; only while the lease is held.

        Raises:
            UnavailableError: The server does not say.
        """
        path = self._path(self.epoch)
        try:
            self._os.touch(path)
            return self._os.stat(path).modified_s
        except OSError as error:
            raise translate(error, doing="touch", path=path) from error

    def release(self) -> None:
        """End the epoch that this host holds, so that others need not wait; what fails, patience mends."""
        if not self.epoch:
            return
        path = self._path(self.epoch)
        self.epoch = 0
        try:
            # No room is needed for a rename, and an epoch that was followed stays followed.
            self._os.rename(path, f"{path.removesuffix('.json')}.done")
        except OSError:
            return

    def sight(self) -> Sight | None:
        """Return the newest epoch as this host sees it; None if there was never one.

        Raises:
            UnavailableError: It cannot be read.
        """
        names = self._names()
        if not names:
            return None
        newest = max(names, key=lambda name: (name.epoch, name.released))
        if newest.released:
            return Sight(epoch=newest.epoch, holder="", beat=0.0, released=True)
        path = self._path(newest.epoch)
        try:
            document = read_document(path, EpochDocument, os_calls=self._os)
            holder = document.holder if document is not None else ""
        except InvalidError:
            holder = ""  # Damaged: nobody's, and followed like one whose holder has died.
        try:
            beat = self._os.stat(path).modified_s
        except OSError as error:
            if not is_absence(error):
                raise translate(error, doing="look at", path=path) from error
            beat = 0.0  # Released a moment ago, or not in this host's caches yet.
        return Sight(epoch=newest.epoch, holder=holder, beat=beat, released=False)

    def _look(self) -> Watch:
        self._watch = observe(self._watch, self.sight(), now_s=self._clock.monotonic_s())
        return self._watch

    def _is_mine(self, sight: Sight | None, epoch: int) -> bool:
        """Whether the newest epoch is this host's; a later one, or the word of another, says no."""
        return sight is not None and (sight.epoch, sight.holder) == (epoch, self._holder)

    def _names(self) -> list[_Name]:
        found = map(_NAME.fullmatch, names_in(self._os, self._directory, directories=False))
        return [_Name(int(name[1], 16), name[2] == "done") for name in found if name]

    def _path(self, epoch: int) -> str:
        return f"{self._directory}/{epoch:016x}.json"

    def _forget_old(self, epoch: int) -> None:
        """Remove the files of epochs long past; what fails is left to the next holder."""
        for name in self._names():
            if name.epoch <= epoch - EPOCHS_KEPT:
                kind = "done" if name.released else "json"
                try:
                    self._os.unlink(f"{self._directory}/{name.epoch:016x}.{kind}")
                except OSError:
                    return
