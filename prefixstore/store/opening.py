"""Which index a store uses: this host's, one that the caller made, or one in memory."""

import logging
from typing import Literal

from prefixstore.clock import Clock
from prefixstore.config import StoreConfig
from prefixstore.errors import UnavailableError
from prefixstore.index.base import Index
from prefixstore.index.memory_index import MemoryIndex

__all__ = ["open_index"]

LOG = logging.getLogger(__name__)

TOOL_ROWS_MAX = 2**24
"""For who asks for no index and reads a whole root once: 400 bytes for each chunk that it really has, and no
answer that leaves most of them out."""


def open_index(
    wanted: Index | Literal["auto"] | None,
    *,
    config: StoreConfig,
    store_id: str,
    discard: bool,
    clock: Clock,
) -> Index:
    """Return the index to use; one in memory where this host's cannot be opened now.

    Args:
        wanted: An index that the store takes over; ``"auto"`` for this host's, in
            ``config.index_dir``; None for none that outlives this process.
        config: The store's settings.
        store_id: Which store it is an index of.
        discard: Start this host's index anew: it is suspected of having killed a process.
        clock: For the index.

    Raises:
        InvalidError: ``config.index_dir`` must not hold an index.
    """
    if wanted != "auto":
        return MemoryIndex(rows_max=TOOL_ROWS_MAX) if wanted is None else wanted
    if config.index_dir is None:
        return MemoryIndex()
    from prefixstore.index.lmdb_index import LmdbIndex

    try:
        return LmdbIndex.open(
            config.index_dir,
            store_id=store_id,
            map_bytes=config.index_map_bytes,
            discard=discard,
            clock=clock,
        )
    except UnavailableError as error:
        LOG.warning("prefixstore goes on without an index on disk: %s", error)
        return MemoryIndex()
