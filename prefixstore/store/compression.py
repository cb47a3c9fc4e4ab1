"""Which codec the next chunk is stored with: as configured, or by what the last ones were like.

``auto`` tries byte planes with zstd on the beginning of one payload in 32 and stores raw where that does
not pay. Chunks of one namespace are alike (one model, one dtype), so one sample speaks for its
neighbours: the cost is a millisecond in 32 chunks.
"""

import threading
from typing import Literal

from prefixstore.blob.codec import SAMPLE_BYTES, is_worth_it
from prefixstore.config import Codec

__all__ = ["CodecChoice"]

CHUNKS_PER_SAMPLE = 32


class CodecChoice:
    """The codec of a store's new blobs. Safe for concurrent use."""

    def __init__(self, configured: Literal["auto", "raw", "zstd", "shuffle+zstd"]) -> None:
        self._fixed = None if configured == "auto" else Codec(configured)
        self._lock = threading.Lock()
        self._chunks = 0
        self._chosen = Codec.RAW

    def choose(self, payload: memoryview, *, element_bytes: int) -> Codec:
        """Return the codec for ``payload``."""
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            sample_it = self._chunks % CHUNKS_PER_SAMPLE == 0
            self._chunks += 1
        if sample_it:
            worth_it = is_worth_it(
                payload[:SAMPLE_BYTES], codec=Codec.SHUFFLE_ZSTD, element_bytes=element_bytes
            )
            self._chosen = Codec.SHUFFLE_ZSTD if worth_it else Codec.RAW
        return self._chosen
