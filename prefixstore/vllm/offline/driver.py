"""Computing prompts on an engine in this process until the root has all their chunks.

The engine gets no more new chunks at once than its CPU tier stages, so that none is dropped for want of a slot;
a prompt whose first missing chunk another one is computing waits for that, here and, by a claim, on other
hosts. A prompt is done when its chunks are seen in the root, whoever stored them.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import InvalidError
from prefixstore.keys import Key
from prefixstore.vllm.offline.work import Seen, Work

if TYPE_CHECKING:
    from prefixstore.ops.claims import Claims

__all__ = ["Computed", "Driver", "EngineLike", "Progress"]

SETTLE_S = 45.0
"""How long computed chunks may take to be stored without one more coming: longer than the default deadline of
a store, after which the engine has given it up."""
ATTEMPTS_MAX = 3
"""How often a prompt is computed without a chunk more being stored."""
LOOKAHEAD = 128
"""Prompts beyond the first that may go before it while it waits for another one's beginning."""
RUNNING_MAX = 256
LOOK_AGAIN_S = 0.5
"""How often what waits is looked at: a few metadata reads a prompt."""
IDLE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """One prompt that the engine has been through.

    Attributes:
        request: The request's name.
        tokens: The prompt's length.
        cached_tokens: How many of them were not computed.
    """

    request: str
    tokens: int
    cached_tokens: int


class EngineLike(Protocol):
    """The engine, as the driver uses it."""

    def add(self, request: str, tokens: Sequence[int]) -> None:
        """Queue a prompt; raises ValueError for one that the engine cannot take."""

    def step(self) -> list[Computed]:
        """Take one step; returns the prompts that are through."""

    def nudge(self) -> None:
        """Take a step though nothing is queued: what is being stored moves on only with steps."""


@dataclass(slots=True)
class Progress:
    """How far all prompts have come.

    Attributes:
        prompts: Prompts there are, each line of the file one.
        done_prompts: Those that are stored, or will not be.
        tokens: Tokens of all prompts.
        done_tokens: Tokens of those that are done.
        computed_tokens: Tokens that this process computed.
        cached_tokens: Tokens of computed prompts that were loaded, or in the engine's memory.
        stored_chunks: Chunks that came while this process worked on them.
        stored_bytes: What their files take.
        waiting_prompts: Prompts that another process has claimed.
    """

    prompts: int = 0
    done_prompts: int = 0
    tokens: int = 0
    done_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    stored_chunks: int = 0
    stored_bytes: int = 0
    waiting_prompts: int = 0


class Driver:
    """Brings prompts into a root. Used once, by one thread."""

    def __init__(
        self,
        engine: EngineLike,
        seen: Seen,
        claims: "Claims",
        *,
        slots: int,
        store_reason: Callable[[], str],
        watch: Callable[[Progress], None],
        clock: Clock | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        """Prepare.

        Args:
            engine: Computes and stores.
            seen: Looks for chunks in the root.
            claims: Who computes what; of the same namespace.
            slots: Chunks that the engine's CPU tier has room for.
            store_reason: Says why the store does not store; empty if it does.
            watch: Told of the progress, often.
            clock: The clock.
            settle_s: As ``SETTLE_S``.
        """
        self._engine = engine
        self._seen = seen
        self._claims = claims
        self._room_chunks = max(1, slots // 2)
        self._store_reason = store_reason
        self._watch = watch
        self._clock = clock or SystemClock()
        self._settle_s = settle_s
        self._numbers = itertools.count()
        self._pending: list[Work] = []
        self._look_at_s: dict[int, float] = {}
        self._running: dict[str, _Begun] = {}
        self._settling: list[_Begun] = []
        self.progress = Progress()

    def run(self, work: Sequence[Work]) -> None:
        """Work until every prompt is stored, or has an error.

        Raises:
            FullError, UnavailableError: The root is away; run again to go on.
        """
        self._pending = list(work)
        self.progress.prompts = sum(len(each.lines) for each in work)
        self.progress.tokens = sum(len(each.tokens) * len(each.lines) for each in work)
        while self._pending or self._running or self._settling:
            self._claims.beat()
            moved = self._admit()
            if self._running:
                for computed in self._engine.step():
                    self._take(computed)
            elif self._settling:
                self._engine.nudge()
                self._clock.sleep(IDLE_S)
            elif not moved:
                self._clock.sleep(LOOK_AGAIN_S)
            self._settle()
            self._watch(self.progress)

    def _admit(self) -> bool:
        """Give the engine what it may compute now; return whether anything moved."""
        waiting = 0
        stay: list[Work] = []
        looked_at = self._pending[:LOOKAHEAD]
        busy = {key for begun in self._busy() for key in begun.work.needed[begun.work.stored :]}
        is_full = len(self._running) >= RUNNING_MAX
        for work in looked_at:
            if is_full or self._clock.monotonic_s() < self._look_at_s.get(id(work), 0.0):
                stay.append(work)
                continue
            first = self._seen.first_missing(work)
            if first is None:
                self._end(work)
                continue
            is_full = not self._has_room(work)
            if not is_full and first not in busy:
                if self._begin(work, first):
                    busy.update(work.needed[work.stored :])
                    continue
                waiting += len(work.lines)
            stay.append(work)
            self._look_at_s[id(work)] = self._clock.monotonic_s() + LOOK_AGAIN_S
        self._pending = stay + self._pending[len(looked_at) :]
        self.progress.waiting_prompts = waiting
        return len(stay) < len(looked_at)

    def _begin(self, work: Work, first: Key) -> bool:
        """Claim a prompt and queue it; False if another process has claimed it.

        Its first missing chunk is claimed for all prompts that begin alike, and its last for itself: while
        the chunks come one after the other, the first that is missing has no claim.
        """
        claimed = (first, work.needed[-1])
        try:
            is_ours = all(map(self._claims.acquire, claimed))
        except InvalidError as error:
            self._release(claimed)
            self._end(work, error=str(error))
            return True
        # Whoever had the claim until now may just have stored the chunk.
        if not is_ours or self._seen.first_missing(work) != first:
            self._release(claimed)
            return False
        request = f"prefill-{next(self._numbers)}"
        try:
            self._engine.add(request, work.tokens)
        except ValueError as error:
            self._release(claimed)
            self._end(work, error=f"the engine does not take it: {error}")
            return True
        work.was_computed = True
        self._running[request] = _Begun(work=work, claimed=claimed, stored_before=work.stored)
        return True

    def _take(self, computed: Computed) -> None:
        """Wait for the chunks of a prompt that the engine has been through."""
        begun = self._running.pop(computed.request, None)
        if begun is None:
            return
        self.progress.cached_tokens += computed.cached_tokens
        self.progress.computed_tokens += computed.tokens - computed.cached_tokens
        begun.seen_at_s = self._clock.monotonic_s()
        self._settling.append(begun)

    def _settle(self) -> None:
        """See which chunks have come; end prompts that have all, and those that get no more."""
        still: list[_Begun] = []
        now_s = self._clock.monotonic_s()
        for begun in self._settling:
            work, before = begun.work, begun.work.stored
            if self._seen.first_missing(work) is None:
                self._count(begun)
                self._end(work)
                continue
            if work.stored > before:
                begun.seen_at_s = now_s
            if now_s - begun.seen_at_s <= self._settle_s:
                still.append(begun)
                continue
            self._count(begun)
            work.attempts = 0 if work.stored > begun.stored_before else work.attempts + 1
            if work.attempts < ATTEMPTS_MAX:
                self._pending.insert(0, work)
            else:
                why = self._store_reason() or "the engine's log may say why"
                self._end(work, error=f"computed, but not stored: {why}")
        self._settling = still

    def _count(self, begun: "_Begun") -> None:
        """Account for what came while a prompt was worked on, and let go of its claims."""
        came = begun.work.needed[begun.stored_before : begun.work.stored]
        self.progress.stored_chunks += len(came)
        self.progress.stored_bytes += sum(self._seen.sizes[key] for key in came)
        self._release(begun.claimed)

    def _release(self, claimed: Iterable[Key]) -> None:
        for key in claimed:
            self._claims.release(key)

    def _end(self, work: Work, *, error: str | None = None) -> None:
        work.error = error
        self._look_at_s.pop(id(work), None)
        self.progress.done_prompts += len(work.lines)
        self.progress.done_tokens += len(work.tokens) * len(work.lines)

    def _has_room(self, work: Work) -> bool:
        taken = sum(begun.work.missing_chunks for begun in self._busy())
        return not taken or taken + work.missing_chunks <= self._room_chunks

    def _busy(self) -> list["_Begun"]:
        return [*self._running.values(), *self._settling]


@dataclass(slots=True, kw_only=True)
class _Begun:
    """A prompt that the engine has got.

    Attributes:
        work: The prompt.
        claimed: The chunks that are claimed for it.
        stored_before: How many of its chunks were stored when it began.
        seen_at_s: When a chunk of it came last, or the engine was through with it.
    """

    work: Work
    claimed: tuple[Key, ...]
    stored_before: int
    seen_at_s: float = 0.0
