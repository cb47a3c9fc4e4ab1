"""How chunks relate to tokens in each KV group, and which of them a request needs. Pure.

    tokens   0        128       256       384       512       640
    full     [   0   ][   1   ][   2   ][   3   ][   4   ]         to go on after 640: all
    window                               [   3   ][   4   ]         of 256 tokens: those it sees

A group of full attention serves up to its first missing chunk. A group with a sliding window serves
wherever the window before that place is whole, so its windows are kept at **boundaries**: every so many
tokens, and where a prompt ends.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["ChunkShape", "chunk_step", "is_kept", "match_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShape:
    """How tokens, hashes, blocks and chunks of one KV group relate; all in tokens but for ``blocks``.

    Attributes:
        group: vLLM's number of the group, which its chunks' keys end with.
        blocks: Blocks of one chunk.
        window: Tokens that a token sees, itself among them; None: all before it.
    """

    tokens_per_hash: int
    tokens_per_block: int
    blocks: int
    group: int = 0
    window: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one chunk."""
        return self.tokens_per_block * self.blocks

    @property
    def hashes(self) -> int:
        """Block hashes of one chunk; its key is the last one's."""
        return self.tokens // self.tokens_per_hash

    def first_needed(self, tokens: int) -> int:
        """Return the first chunk that a request needs which goes on after ``tokens``.

        vLLM holds no block before it (v1/core/single_type_kv_cache_manager.py,
        ``get_num_skipped_tokens``).
        """
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.tokens


def chunk_step(shapes: Sequence[ChunkShape]) -> int:
    """Return the tokens that whole chunks of every group divide."""
    return math.lcm(*(shape.tokens for shape in shapes))


def match_tokens(
    shapes: Sequence[ChunkShape],
    present: "Sequence[bytes | bytearray]",
    *,
    local_tokens: int,
    most_tokens: int,
) -> int:
    """Return after how many tokens a request can go on, what it has itself included.

    Args:
        shapes: Of each group.
        present: For each group, one byte a chunk from the first: whether it can be loaded.
        local_tokens: What the engine's own cache holds; a multiple of all chunks' blocks.
        most_tokens: After how many at most.
    """
    step = chunk_step(shapes)
    runs = [_runs(flags) for flags in present]
    for tokens in range(most_tokens // step * step, local_tokens, -step):
        if all(
            _serves(shape, run, tokens=tokens, local_tokens=local_tokens)
            for shape, run in zip(shapes, runs, strict=True)
        ):
            return tokens
    return local_tokens


def is_kept(shape: ChunkShape, number: int, *, interval: int, ends: Iterable[int]) -> bool:
    """Whether a chunk is needed at a boundary.

    Args:
        shape: Of its group.
        number: Of the chunk.
        interval: Every multiple of it is a boundary; 0: none is.
        ends: Further boundaries.
    """
    if shape.window is None:
        return True
    after = (number + 1) * shape.tokens
    boundaries = [end for end in ends if end >= after]
    if interval:
        boundaries.append(-(-after // interval) * interval)
    return any(shape.first_needed(boundary) <= number for boundary in boundaries)


def _runs(flags: "bytes | bytearray") -> list[int]:
    """Return for each chunk how many are there in a row up to it."""
    runs, run = [], 0
    for is_there in flags:
        run = run + 1 if is_there else 0
        runs.append(run)
    return runs


def _serves(shape: ChunkShape, runs: Sequence[int], *, tokens: int, local_tokens: int) -> bool:
    """Whether a group has what a request needs that goes on after ``tokens``."""
    count = tokens // shape.tokens
    first = max(shape.first_needed(tokens), local_tokens // shape.tokens)
    return first >= count or (count <= len(runs) and runs[count - 1] >= count - first)
