"""Whether a match of the direct path is worth loading, by what its workers' loads and its steps took.

Each rank loads a part of its own, beside the others: so bytes are one rank's, and what any of them saw of
its loads is an observation. The decision itself is the tier's too (``prefixstore.vllm.worth``).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prefixstore.clock import Clock
from prefixstore.vllm.worth import LoadWorth, PrefillMeter, Rate

if TYPE_CHECKING:
    from prefixstore.vllm.direct.messages import RankReport

__all__ = ["LoadNotes", "MatchWorth"]


class LoadNotes(Rate):
    """A rate that keeps its observations, to be sent to who decides."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[float, float, int]] = []

    def note(self, amount: float, seconds: float, *, count: int = 1) -> None:
        """Keep what ``count`` observations came to together."""
        self.notes.append((amount, seconds, count))

    def take(self) -> list[tuple[float, float, int]]:
        """Return what was kept, once."""
        notes, self.notes = self.notes, []
        return notes


class MatchWorth:
    """Decides for the matches of one engine. For the scheduler's thread.

    Args:
        chunk_bytes: For each KV group, what one rank reads of a chunk.
        declined: Told how many chunks of a match are not loaded.
    """

    def __init__(
        self, chunk_bytes: Sequence[int], *, clock: Clock, declined: Callable[[int], None]
    ) -> None:
        self._chunk_bytes = tuple(chunk_bytes)
        self._clock = clock
        self._declined = declined
        self._prefill = PrefillMeter()
        self._worth = LoadWorth(prefill=self._prefill.rate)

    def begin_step(self, scheduled_tokens: "dict[str, int]") -> None:
        """Note a step that computes something; each is ended by a report of each rank."""
        # A request that decodes computes one token a step.
        prompts = sum(tokens for tokens in scheduled_tokens.values() if tokens > 1)
        self._prefill.begin_step(prompts, now_s=self._clock.monotonic_s())

    def take_reports(self, reports: "Sequence[RankReport]") -> None:
        """Note what the ranks saw in a step."""
        if any(report.ends_step for report in reports):
            self._prefill.end_step(now_s=self._clock.monotonic_s())
        for report in reports:
            for amount, seconds, count in report.loads:
                self._worth.loads.note(amount, seconds, count=count)

    def pays(self, chunks: Sequence[int], *, tokens: int) -> bool:
        """Whether to load a match.

        Args:
            chunks: How many of each KV group.
            tokens: What would not be computed.
        """
        load_bytes = sum(
            count * size for count, size in zip(chunks, self._chunk_bytes, strict=True)
        )
        pays = self._worth.pays(
            load_bytes=load_bytes, tokens=tokens, now_s=self._clock.monotonic_s()
        )
        if not pays:
            self._declined(sum(chunks))
        return pays
