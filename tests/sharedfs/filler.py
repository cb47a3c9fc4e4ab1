"""A writer in a process of its own: stores so many chunks at full speed, then stays until stdin ends.

    python -m tests.sharedfs.filler ROOT INDEX NAME SECONDS MAX_BYTES CHUNKS

Prints one JSON line when it has stopped storing: how many chunks it stored and skipped.
"""

import json
import os
import sys
import time
from collections import Counter

from prefixstore.config import StoreConfig
from prefixstore.keys import Key
from prefixstore.store import Chunk, PrefixStore
from prefixstore.testing.chains import FIELDS, TOKENS, chain

__all__ = ["FILLER_FILE_BYTES", "FILLER_RAW_BYTES"]

FILLER_RAW_BYTES = 2**18
FILLER_FILE_BYTES = FILLER_RAW_BYTES + 4096
CHAIN = 20


def fill(store: PrefixStore, name: str, *, seconds: float, chunks: int) -> Counter[str]:
    """Store chains of chunks, one after the other, until so many are stored or the time is over."""
    outcomes: Counter[str] = Counter()
    end_s, number = time.monotonic() + seconds, 0
    while True:
        # Few directories: making them is not what is tested.
        keys = [
            Key(bytes([at % 4, 0]) + key[2:])
            for at, key in enumerate(chain(f"{name}/{number}", CHAIN))
        ]
        number += 1
        parent = None
        for at, key in enumerate(keys):
            if time.monotonic() > end_s or outcomes["stored"] >= chunks:
                return outcomes
            chunk = Chunk(key=key, parent=parent, end_token=(at + 1) * TOKENS)
            outcome = store.store(chunk, os.urandom(FILLER_RAW_BYTES))
            outcomes[str(outcome.reason or "stored")] += 1
            if not outcome.published:
                # An engine that is refused computes on; it does not spin.
                time.sleep(0.01)
                break
            parent = key


def main() -> None:
    """Fill, tell, and wait to be told to end."""
    root, index_dir, name, seconds, max_bytes, chunks = sys.argv[1:]
    config = StoreConfig(index_dir=index_dir, max_bytes=int(max_bytes) or None)
    with PrefixStore.open(root, namespace=FIELDS, config=config) as store:
        outcomes = fill(store, name, seconds=float(seconds), chunks=int(chunks))
        sys.stdout.write(json.dumps({"outcomes": outcomes, "counters": store.counters()}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
