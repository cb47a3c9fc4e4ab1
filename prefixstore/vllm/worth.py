"""Whether loading a match is worth it: measured load bandwidth against measured prefill rate.

A load leaves the device to other requests, so it may take somewhat longer than computing the same
tokens and still pay. On a slow share under a fast device it takes many times longer, and a hit is then
a loss for the request and nobody's gain. Sizes and times in, decisions out: no clock, no I/O.

A match is declined only on evidence: enough loads and enough prefill steps seen, and the load expected
to take more than ``LOSES_BY`` times as long as computing. Matches are taken again once a load would be
about as fast. While they are declined one is let through from time to time, since only loads tell
whether loads have become faster.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

__all__ = ["LoadMeter", "LoadWorth", "PrefillMeter", "Rate"]

logger = logging.getLogger("prefixstore")

DECAY = 0.9
"""Weight of what was seen before, for each new observation: some twenty of them decide."""
OBSERVATIONS_NEEDED = 8
"""Fewer say more of a cold cache or a first compilation than of the machine."""
LOSES_BY = 2.0
"""A load that takes longer than this many times the prefill is declined."""
PAYS_AT = 1.0
"""Loads are taken again when they are expected to take no longer than this many times the prefill."""
PROBE_INTERVAL_S = 10.0
"""How often a match is loaded to measure with, while matches are declined."""
PREFILL_STEP_TOKENS = 64
"""Steps with fewer prompt tokens spend their time on something else."""
STEPS_IN_FLIGHT = 8
"""More than vLLM ever schedules ahead; beyond it, steps ended without our being told."""


@dataclass(slots=True)
class Rate:
    """Amount over time, recent observations weighing most."""

    amount: float = 0.0
    seconds: float = 0.0
    observations: int = 0

    def note(self, amount: float, seconds: float, *, count: int = 1) -> None:
        """Take what ``count`` observations came to together; what took no time tells nothing."""
        if seconds <= 0:
            return
        self.amount = self.amount * DECAY**count + amount
        self.seconds = self.seconds * DECAY**count + seconds
        self.observations += count

    @property
    def per_s(self) -> float | None:
        """The rate a second; None while too little was seen."""
        if self.observations < OBSERVATIONS_NEEDED or not self.amount:
            return None
        return self.amount / self.seconds


@dataclass(slots=True)
class PrefillMeter:
    """Measures how fast prompts are computed, from the beginning and end of each step.

    Steps end in the order in which they began, some of them scheduled while the one before runs.
    """

    rate: Rate = field(default_factory=Rate)
    _running: deque[tuple[int, float]] = field(default_factory=deque)
    _last_end_s: float = 0.0

    def begin_step(self, prompt_tokens: int, *, now_s: float) -> None:
        """Note a step that computes so many tokens of prompts."""
        if len(self._running) >= STEPS_IN_FLIGHT:
            self._running.clear()
        self._running.append((prompt_tokens, now_s))

    def end_step(self, *, now_s: float) -> None:
        """Note the end of the oldest step that still runs."""
        if not self._running:
            return
        tokens, began_s = self._running.popleft()
        if tokens >= PREFILL_STEP_TOKENS:
            self.rate.note(tokens, now_s - max(began_s, self._last_end_s))
        self._last_end_s = now_s


@dataclass(slots=True)
class LoadMeter:
    """Measures how fast chunks are loaded: bytes over the time in which any load ran.

    Loads that overlap share one way to the storage, and each waits for the others. So those that ran together,
    which is all that began before the first of them ended, are noted together once they have ended.
    """

    rate: Rate
    _running: dict[int, float] = field(default_factory=dict)  # Load → when it began.
    _together: set[int] = field(default_factory=set)
    _ended: int = 0
    _bytes: int = 0
    _seconds: float = 0.0
    _counted_to_s: float = 0.0

    def begin(self, load: int, *, now_s: float) -> None:
        """Note a load that begins."""
        self._running[load] = now_s
        if not self._ended:
            self._together.add(load)

    def end(self, load: int, *, landed_bytes: int, elapsed_s: float) -> None:
        """Note how a load ended, whenever one hears of it."""
        if (began_s := self._running.pop(load, None)) is None:
            return
        ended_s = began_s + elapsed_s
        first_s = min(began_s, *self._running.values()) if self._running else began_s
        self._seconds += max(0.0, ended_s - max(first_s, self._counted_to_s))
        self._counted_to_s = max(ended_s, self._counted_to_s)
        self._bytes += landed_bytes
        self._ended += 1
        self._together.discard(load)
        if not self._together:
            self.rate.note(self._bytes, self._seconds, count=self._ended)
            self._ended, self._bytes, self._seconds = 0, 0, 0.0
            self._together = set(self._running)


@dataclass(slots=True)
class LoadWorth:
    """Decides for each match, and logs when what it decides changes. Not thread-safe.

    Attributes:
        loads: Bytes that loads brought, over their time.
        prefill: Tokens of prompts computed, over the time of their steps.
        declining: Whether matches are declined now.
    """

    prefill: Rate
    loads: Rate = field(default_factory=Rate)
    declining: bool = False
    _probed_s: float = 0.0

    def expected_ratio(self, *, load_bytes: int, tokens: int) -> float | None:
        """Return how many times longer loading would take than computing; None without evidence."""
        bytes_per_s, tokens_per_s = self.loads.per_s, self.prefill.per_s
        if bytes_per_s is None or tokens_per_s is None or tokens <= 0:
            return None
        return (load_bytes / bytes_per_s) / (tokens / tokens_per_s)

    def pays(self, *, load_bytes: int, tokens: int, now_s: float) -> bool:
        """Whether to load a match.

        Args:
            load_bytes: What would be read.
            tokens: What would not be computed.
            now_s: Monotonic time.
        """
        ratio = self.expected_ratio(load_bytes=load_bytes, tokens=tokens)
        if ratio is None:
            return True
        was_declining = self.declining
        self.declining = ratio > (PAYS_AT if was_declining else LOSES_BY)
        if self.declining is not was_declining:
            logger.warning("%s", self._account(ratio, tokens))
        if not self.declining:
            return True
        if was_declining and now_s - self._probed_s >= PROBE_INTERVAL_S:
            self._probed_s = now_s
            return True
        if not was_declining:
            self._probed_s = now_s
        return False

    def _account(self, ratio: float, tokens: int) -> str:
        """Say in a sentence what is done with matches now, and on which evidence."""
        return (
            f"stored matches are {'declined' if self.declining else 'loaded again'}: loading {tokens} "
            f"tokens would take {ratio:.1f} times as long as computing them "
            f"({(self.loads.per_s or 0.0) / 1e6:.0f} MB/s read, {self.prefill.per_s or 0.0:.0f} "
            "tokens/s computed); load_policy=always loads regardless"
        )
