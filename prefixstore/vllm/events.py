"""KV events of our tier: which chunks are stored, and which are not any more, for cache-aware routers.

vLLM publishes the events of each tier in the engine's own stream, with the tier's medium
(vllm/distributed/kv_transfer/kv_connector/v1/offloading/events.py turns keys into block hashes). A chunk is
announced as **stored** when a store of this engine has ended with the chunk on the root, whoever put it
there; as **removed** when this engine evicts it, or finds it gone where its index promised it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import groupby

from vllm.v1.kv_offload.base import Locality, Medium, OffloadingEvent, OffloadKey

from prefixstore.ioproc.jobs import ChunkChange
from prefixstore.keys import Key

__all__ = ["CHANGES_MAX", "OriginalKeys", "events_of"]

CHANGES_MAX = 65536
"""Changes that may wait for the engine's next step, some 10 MB. An engine that serves takes them every
few milliseconds; one that idles meanwhile evicts at most so many chunks without the routers missing any."""


class OriginalKeys:
    """vLLM's keys of chunks that the store knows by others: those with an adapter. Not thread-safe.

    Bounded: of the chunk that was learnt longest ago routers hear by a hash that they do not know.
    """

    def __init__(self) -> None:
        self._originals: OrderedDict[Key, Key] = OrderedDict()

    def learn(self, originals: Mapping[Key, Key]) -> None:
        """Take vLLM's keys by the store's."""
        self._originals.update(originals)
        while len(self._originals) > CHANGES_MAX:
            self._originals.popitem(last=False)

    def of(self, key: Key) -> Key:
        """Return vLLM's key of a chunk."""
        return self._originals.get(key, key)


def events_of(
    changes: Iterable[ChunkChange], *, originals: OriginalKeys, locality: Locality | None
) -> list[OffloadingEvent]:
    """Turn changes, in their order, into as few events as keep it.

    ``removal_expected`` stays False, as in vLLM's own file tier: with it vLLM would keep the tokens of every
    chunk in memory until it is removed, and a root holds millions.
    """
    return [
        OffloadingEvent(
            keys=[OffloadKey(originals.of(change.key)) for change in run],
            medium=Medium.STORAGE,
            removed=gone,
            locality=locality,
        )
        for gone, run in groupby(changes, key=lambda change: change.gone)
    ]
