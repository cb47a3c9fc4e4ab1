"""What is to be computed, in which order, and how far it has come. Pure but for looking for chunks.

Prompts are ordered by their tokens, so that those with one beginning follow each other and the engine's own
cache has it. A prompt is worked on from its first chunk that is not stored; everything before is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prefixstore.keys import Key
from prefixstore.vllm.offline.keying import Keying

__all__ = ["Look", "Seen", "Work", "plan_work"]

Look = Callable[[Key], int | None]
"""Says of a chunk what its file takes, None if it is not stored."""


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One prompt to compute; several lines of a file with the same tokens are one.

    Attributes:
        lines: Where it is in the file.
        tokens: Its tokens.
        needed: The chunks that a later request needs, front to back.
        keys: All its chunks, in all KV groups.
        tail_tokens: How many of the last tokens belong to no whole chunk.
        stored: How many of ``needed``, from the front, were seen to be stored.
        was_computed: This process has computed some of it.
        attempts: How often that was done without a chunk more being stored.
        error: Why it cannot be stored; None while it may.
    """

    lines: list[int]
    tokens: tuple[int, ...]
    needed: tuple[Key, ...]
    keys: tuple[Key, ...]
    tail_tokens: int = 0
    stored: int = 0
    was_computed: bool = False
    attempts: int = 0
    error: str | None = None

    @property
    def missing_chunks(self) -> int:
        """How many needed chunks are not known to be stored."""
        return len(self.needed) - self.stored


@dataclass(slots=True)
class Seen:
    """Chunks that were seen to be stored: each is looked for until it is found, and not again.

    Attributes:
        look: Looks for one.
        sizes: What was found, with the sizes of the files.
    """

    look: Look
    sizes: dict[Key, int] = field(default_factory=dict)

    def first_missing(self, work: Work) -> Key | None:
        """Advance over what is stored; return the first chunk that is not, None if all are.

        Raises:
            UnavailableError: The root does not say.
        """
        while work.stored < len(work.needed):
            key = work.needed[work.stored]
            if key not in self.sizes:
                size = self.look(key)
                if size is None:
                    return key
                self.sizes[key] = size
            work.stored += 1
        return None


def plan_work(prompts: Iterable[tuple[int, Sequence[int]]], keying: Keying) -> list[Work]:
    """Order prompts by prefix, equal ones joined.

    Args:
        prompts: Lines and tokens.
        keying: How the namespace makes keys.
    """
    by_tokens: dict[tuple[int, ...], list[int]] = {}
    for line, tokens in prompts:
        by_tokens.setdefault(tuple(tokens), []).append(line)
    planned = []
    for tokens in sorted(by_tokens):
        chains = keying.keys(tokens)
        planned.append(
            Work(
                lines=by_tokens[tokens],
                tokens=tokens,
                needed=tuple(keying.needed(chains)),
                keys=tuple(key for chain in chains for key in chain),
                tail_tokens=len(tokens) % min(keying.tokens_per_chunk),
            )
        )
    return planned
