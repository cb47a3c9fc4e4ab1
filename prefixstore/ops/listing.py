"""Chunks by what people ask of them, and how much of a prompt is stored."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prefixstore.errors import InvalidError
from prefixstore.index.base import Row
from prefixstore.keys import Key, NamespaceId, kv_group
from prefixstore.ops.report import ChunkLine, chunk_line
from prefixstore.store import PrefixStore

__all__ = ["ChunkFilter", "PromptHolding", "holdings", "list_chunks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFilter:
    """Which chunks to list; None does not ask.

    Attributes:
        used_before_s: Last used before, in seconds since the epoch.
        used_since_s: Last used then or later.
        file_bytes_min: Files of at least this size.
        file_bytes_max: Files of at most this size.
        end_token_min: Chunks that end no earlier in their prompt.
        end_token_max: Chunks that end no later.
        pin: Chunks that the pin of this name names.
    """

    used_before_s: float | None = None
    used_since_s: float | None = None
    file_bytes_min: float | None = None
    file_bytes_max: float | None = None
    end_token_min: int | None = None
    end_token_max: int | None = None
    pin: str | None = None

    def takes(self, row: Row, pinned: Collection[tuple[NamespaceId, Key]]) -> bool:
        """Whether a chunk is to be listed; ``pinned`` is what the pin names."""
        record = row.record
        return (
            (self.used_before_s is None or record.used_s < self.used_before_s)
            and (self.used_since_s is None or record.used_s >= self.used_since_s)
            and (self.file_bytes_min is None or record.file_bytes >= self.file_bytes_min)
            and (self.file_bytes_max is None or record.file_bytes <= self.file_bytes_max)
            and (self.end_token_min is None or record.end_token >= self.end_token_min)
            and (self.end_token_max is None or record.end_token <= self.end_token_max)
            and (self.pin is None or (row.namespace, row.key) in pinned)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptHolding:
    """What one namespace holds of one prompt.

    Attributes:
        line: Where the prompt is in its file.
        tokens: Its length.
        namespace: Where the chunks are; None if no namespace holds any.
        chunks: Its whole chunks, in all KV groups.
        stored_chunks: How many of them are stored.
        stored_bytes: What their files take.
        prefix_tokens: Tokens from its start that are stored without a gap, in the KV group that has the
            most of them: groups of a sliding window keep only the last chunks.
        stored_keys: The stored chunks' keys in hex digits.
        error: Why the prompt has no keys; None if it has.
    """

    line: int
    tokens: int
    namespace: NamespaceId | None
    chunks: int
    stored_chunks: int
    stored_bytes: int
    prefix_tokens: int
    stored_keys: tuple[str, ...]
    error: str | None


def list_chunks(
    store: PrefixStore, namespace: NamespaceId | None, wanted: ChunkFilter, *, limit: int
) -> tuple[list[ChunkLine], int]:
    """Return chunks in the order in which eviction would look at them, and how many there are in all.

    Args:
        store: The root, with its index reconciled.
        namespace: Where to look; None for everywhere.
        wanted: Which chunks.
        limit: How many to return.

    Raises:
        InvalidError: No pin is called ``wanted.pin``, or its file is damaged.
    """
    pinned: frozenset[tuple[NamespaceId, Key]] = frozenset()
    if wanted.pin is not None:
        pins = [pin for pin in store.pins() if pin.name == wanted.pin]
        if not pins:
            raise InvalidError(
                f"no pin of {store.root.path} is called {wanted.pin!r}: see `prefixstore pins`"
            )
        pinned = frozenset((pin.namespace, key) for pin in pins for key in pin.keys)
    matching = (row for row in store.hints.oldest_first(namespace) if wanted.takes(row, pinned))
    lines = [chunk_line(row) for row in itertools.islice(matching, limit)]
    return lines, len(lines) + sum(1 for _ in matching)


def holdings(
    store: PrefixStore,
    chains: Mapping[NamespaceId, Sequence[Sequence[Key]]],
    prompts: Sequence[tuple[int, int, str | None]],
    *,
    everywhere: bool,
) -> list[PromptHolding]:
    """Return what is stored of each prompt.

    Args:
        store: The root, with its index reconciled.
        chains: For each namespace, and in it for each prompt, its keys.
        prompts: For each prompt its line, its tokens, and why it has no keys.
        everywhere: Tell also of namespaces that hold nothing of a prompt.
    """
    found: list[PromptHolding] = []
    for at, (line, tokens, error) in enumerate(prompts):
        lines = [
            _holding(store, namespace, each[at], line=line, tokens=tokens)
            for namespace, each in sorted(chains.items())
            if error is None
        ]
        lines = [each for each in lines if everywhere or each.stored_chunks]
        found += lines or [
            PromptHolding(
                line=line,
                tokens=tokens,
                namespace=None,
                chunks=0,
                stored_chunks=0,
                stored_bytes=0,
                prefix_tokens=0,
                stored_keys=(),
                error=error,
            )
        ]
    return found


def _holding(
    store: PrefixStore, namespace: NamespaceId, keys: Sequence[Key], *, line: int, tokens: int
) -> PromptHolding:
    records = dict(zip(keys, store.hints.get_many(namespace, keys), strict=True))
    stored = {key: record for key, record in records.items() if record is not None}
    prefix_tokens = 0
    for _, group in itertools.groupby(keys, key=kv_group):
        run = list(itertools.takewhile(stored.__contains__, group))
        prefix_tokens = max(prefix_tokens, stored[run[-1]].end_token if run else 0)
    return PromptHolding(
        line=line,
        tokens=tokens,
        namespace=namespace,
        chunks=len(keys),
        stored_chunks=len(stored),
        stored_bytes=sum(record.file_bytes for record in stored.values()),
        prefix_tokens=prefix_tokens,
        stored_keys=tuple(key.hex() for key in stored),
        error=None,
    )
