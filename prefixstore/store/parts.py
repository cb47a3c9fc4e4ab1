"""What the parts of one opened store share: built once, handed to each.

A plain record without behaviour. Who needs what is visible in each part's code; who owns what:
``PrefixStore`` closes the index and leaves the root's writers, nobody else does.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from prefixstore.clock import Clock
from prefixstore.config import StoreConfig
from prefixstore.index.base import Index
from prefixstore.keys import Key, NamespaceId
from prefixstore.store.breaker import Breaker
from prefixstore.store.counters import Counters
from prefixstore.store.hints import Hints
from prefixstore.store.inflight import InFlight
from prefixstore.store.limits import LimitsBook
from prefixstore.store.membership import Membership
from prefixstore.store.pinning import PinBook
from prefixstore.store.recent import RecentKeys
from prefixstore.store.space import Space
from prefixstore.store.usage import Usage
from prefixstore.tree.blobs import BlobTree
from prefixstore.tree.root import Root
from prefixstore.tree.writers import Writers, this_process

__all__ = ["Gone", "Parts"]

Gone = Callable[[NamespaceId, Sequence[Key]], None]
"""Told of chunks that are not there any more; called by any thread, must neither block nor raise."""

SEEN_TTL_S = 1.0
"""How long a chunk that was just seen is believed to be there without another look: as long as a missing
one is believed missing by default."""
STORE_PAUSE_S = 1.0
STORE_PAUSE_MAX_S = 30.0
"""After a failed write stores pause, at first for a second, at most for half a minute: a full disk costs
two failed writes a minute, and one that was freed is used again within that time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The shared parts of one opened store; each is safe for concurrent use.

    Attributes:
        root: The root.
        config: The settings.
        clock: The clock.
        tree: The truth.
        hints: The index.
        counters: What happened.
        membership: This writer among others, and the server's time.
        pins: What must stay.
        inflight: What is being transferred.
        missing: Keys of the store's namespace that were missing a moment ago.
        present: Keys of the store's namespace that were there a moment ago.
        limits: What to keep to.
        usage: What the root holds, as its hosts tell each other.
        space: Room on the root.
        breaker: Whether writing is worth a try.
        background: Whether threads do what need not happen while a request waits.
        gone: Told of chunks that this store removed, or found missing where the index promised them.
    """

    root: Root
    config: StoreConfig
    clock: Clock
    tree: BlobTree
    hints: Hints
    counters: Counters
    membership: Membership
    pins: PinBook
    inflight: InFlight
    missing: RecentKeys
    present: RecentKeys
    limits: LimitsBook
    usage: Usage
    space: Space
    breaker: Breaker
    background: bool
    gone: Gone

    @classmethod
    def build(
        cls,
        root: Root,
        *,
        config: StoreConfig,
        index: Index,
        clock: Clock,
        background: bool,
        gone: Gone,
    ) -> Self:
        """Build the parts of a store on ``root``; takes over ``index``."""
        hints = Hints(index)
        tree = BlobTree(root, config=config, writer=uuid.uuid4().hex, clock=clock)
        writers = Writers(root, this=this_process())
        limits = LimitsBook(root, config=config, clock=clock)
        usage = Usage(
            root,
            writer=tree.writer,
            read_only=config.read_only,
            wanted=lambda: limits.known().counts,
            clock=clock,
        )
        return cls(
            root=root,
            config=config,
            clock=clock,
            tree=tree,
            hints=hints,
            counters=Counters(),
            membership=Membership(root, writers, writer=tree.writer, clock=clock),
            pins=PinBook(root),
            inflight=InFlight(),
            missing=RecentKeys(ttl_s=config.miss_ttl_s, keys_max=config.misses_max, clock=clock),
            present=RecentKeys(ttl_s=SEEN_TTL_S, keys_max=config.misses_max, clock=clock),
            usage=usage,
            limits=limits,
            space=Space(
                limits=limits,
                usage=usage,
                indexed_bytes=lambda: {ns: t.file_bytes for ns, t in hints.totals().items()},
                free_bytes=lambda: root.os_calls.space(root.path).free_bytes,
                clock=clock,
            ),
            breaker=Breaker(pause_s=STORE_PAUSE_S, pause_max_s=STORE_PAUSE_MAX_S, clock=clock),
            background=background,
            gone=gone,
        )
