"""The scheduler's side of the direct path: books only, no I/O, nothing that waits.

For each request: which of its chunks the store holds (asked of the workers, since each rank has a part
of its own), which to load, which to store when a step has computed them, and whether its blocks are
still to be read when it ends. A chunk counts as stored when **every** rank says so: the answer to a
find is the least of theirs.

vLLM calls all of this on its scheduler's thread.
"""

import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefixstore.keys import Key
from prefixstore.vllm.direct.messages import (
    FindOrder,
    LoadChunk,
    LoadOrder,
    StepOrders,
    StepReport,
    StoreOrder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vllm.v1.request import Request

    from prefixstore.clock import Clock

__all__ = ["ChunkShape", "DirectScheduler"]

logger = logging.getLogger("prefixstore")

GROUP = 0
"""The direct path serves models with one KV group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShape:
    """How tokens, hashes, blocks and chunks relate; all in tokens but for ``blocks``."""

    tokens_per_hash: int
    tokens_per_block: int
    blocks: int

    @property
    def tokens(self) -> int:
        """Tokens of one chunk."""
        return self.tokens_per_block * self.blocks

    @property
    def hashes(self) -> int:
        """Block hashes of one chunk; its key is the last one's."""
        return self.tokens // self.tokens_per_hash


@dataclass(slots=True, eq=False)
class _Request:
    """What is remembered of one request, from its arrival to its end.

    Attributes:
        present: How many chunks every rank holds, from the first; None until all have said so.
        ticket: Of the find that is under way.
        asked_s: When it was asked.
        local_tokens: What the engine's own cache held when it was last asked about.
        next_chunk: The first chunk that was neither found nor offered.
        outstanding: Store → ranks that still need its blocks.
        loading: Chunks under way, by each block they go to; empty when none are.
        may_load: False once a load failed: what is missing is computed.
    """

    request: "Request"
    keys: list[Key] = field(default_factory=list)
    present: int | None = None
    ticket: int | None = None
    asked_s: float = 0.0
    local_tokens: int = 0
    next_chunk: int = 0
    outstanding: dict[int, set[int]] = field(default_factory=dict)
    loading: dict[int, int] = field(default_factory=dict)
    may_load: bool = True


@dataclass(slots=True)
class _Find:
    """A find under way: who asked, and what each rank has said."""

    request_id: str
    answers: dict[int, int] = field(default_factory=dict)


class DirectScheduler:
    """Books of the direct path. For one thread.

    Args:
        shape: The chunk's.
        ranks: How many workers each hold a part.
        find_patience_s: How long a request waits for the answer to a find; then nothing was found.
        prompts_only: Store no chunk with generated tokens.
    """

    def __init__(
        self,
        *,
        shape: ChunkShape,
        ranks: int,
        find_patience_s: float,
        clock: "Clock",
        prompts_only: bool = False,
    ) -> None:
        self._shape = shape
        self._ranks = frozenset(range(ranks))
        self._find_patience_s = find_patience_s
        self._clock = clock
        self._prompts_only = prompts_only
        self._requests: dict[str, _Request] = {}
        self._finds: dict[int, _Find] = {}
        self._stores: dict[int, str] = {}
        self._numbers = itertools.count(1)
        self._orders = StepOrders()
        self._is_off = False

    def turn_off(self) -> None:
        """Neither find nor store any more; loads under way still end."""
        self._is_off = True
        self._finds.clear()

    # A request's way.

    def add(self, request: "Request") -> None:
        """Take a request. One with an adapter is left alone: a hash knows an adapter by name only."""
        if request.lora_request is None:
            self._requests[request.request_id] = _Request(request)

    def count_matched(self, request: "Request", local_tokens: int) -> int | None:
        """Say how many tokens past the engine's own can be loaded; None: ask again.

        A prompt that the engine itself holds is asked about all the same, without a wait: the answer
        says what need not be stored.
        """
        state = self._requests.get(request.request_id)
        if state is None or self._is_off or not state.may_load:
            return 0
        self._learn_keys(state)
        state.local_tokens = local_tokens
        # As in the engine's own cache, one token is left to compute.
        loadable = min(len(state.keys), (request.num_tokens - 1) // self._shape.tokens)
        if state.present is None:
            self._ask(state)
            is_late = self._clock.monotonic_s() - state.asked_s > self._find_patience_s
            if loadable * self._shape.tokens <= local_tokens:
                return 0
            if not is_late and state.ticket is not None:
                return None
            self._conclude(state, 0)
        assert state.present is not None, "answered, or concluded just now"
        if request.skip_reading_prefix_cache:
            return 0
        return max(0, min(state.present, loadable) * self._shape.tokens - local_tokens)

    def allocate(self, request: "Request", blocks: "Sequence[int]", tokens: int) -> None:
        """Order the load of ``tokens`` past the engine's own into a request's blocks."""
        if tokens == 0:
            return
        state = self._requests.get(request.request_id)
        assert state is not None, "a request that is not known was told no match"
        per_block, per_chunk = self._shape.tokens_per_block, self._shape.blocks
        begin, end = state.local_tokens // per_block, (state.local_tokens + tokens) // per_block
        chunks = []
        for number in range(begin // per_chunk, -(-end // per_chunk)):
            first = max(begin, number * per_chunk)
            last = min(end, (number + 1) * per_chunk)
            wanted = tuple(blocks[first:last])
            state.loading.update(dict.fromkeys(wanted, number))
            chunks.append(
                LoadChunk(key=state.keys[number], blocks=wanted, first=first - number * per_chunk)
            )
        self._orders.loads.append(LoadOrder(request_id=request.request_id, chunks=tuple(chunks)))

    def doom(self, request_id: str, blocks: "Sequence[int]", tokens: int) -> None:
        """Have a load reported as failed that could not be ordered: its request waits for a report."""
        # For a load that runs between steps, vLLM allocates what it is to bring and nothing behind.
        count = -(-tokens // self._shape.tokens_per_block)
        if (state := self._requests.get(request_id)) is not None:
            state.may_load = False
        self._orders.loads.append(
            LoadOrder(request_id=request_id, chunks=(), doomed=tuple(blocks[-count:]))
        )

    def finish(self, request: "Request") -> bool:
        """Forget a request; True if its blocks must be kept until every worker has read them."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False
        self._finds.pop(state.ticket or 0, None)
        if not self._is_off:
            self._orders.touched += state.keys
        # vLLM keeps the blocks of a request that ends while it loads, until the load has ended.
        is_held = bool(state.outstanding) and not state.loading
        if is_held:
            self._orders.held.append(request.request_id)
        self._forget_stores(state)
        return is_held

    # A step's way.

    def take_loads(self, *, preempted: "Iterable[str]" = ()) -> StepOrders:
        """Begin the orders of a step with what must reach the workers whatever else fails."""
        orders, self._orders = self._orders, StepOrders()
        orders.is_off = self._is_off
        orders.preempted += preempted
        return orders

    def plan(
        self,
        orders: StepOrders,
        *,
        scheduled_tokens: "dict[str, int]",
        blocks_of: "Callable[[str], Sequence[int]]",
    ) -> None:
        """Add a step's finds and stores to its orders."""
        orders.is_idle = not scheduled_tokens
        for request_id in orders.preempted:
            if (state := self._requests.get(request_id)) is not None:
                self._forget_stores(state)
                # What it has stored itself meanwhile is worth a new find when it is resumed.
                self._finds.pop(state.ticket or 0, None)
                state.ticket, state.present = None, None
        if self._is_off:
            orders.finds.clear()
            return
        for request_id, tokens in scheduled_tokens.items():
            if (state := self._requests.get(request_id)) is not None:
                self._offer(orders, state, tokens, blocks_of)

    def take_report(self, report: StepReport) -> None:
        """Note what workers found and which blocks they no longer need."""
        for rank, part in report.ranks.items():
            for ticket, count in part.found.items():
                self._take_answer(rank, ticket, count)
            for number in part.settled:
                self._settle(rank, number)

    def take_failures(self, blocks: "Iterable[int]") -> None:
        """Note blocks that were not loaded: their chunks are computed, and then stored again."""
        failed = set(blocks)
        for state in self._requests.values():
            lost = [state.loading[block] for block in failed & state.loading.keys()]
            if lost:
                state.may_load = False
                state.next_chunk = min([state.next_chunk, *lost])

    def end_loads(self, request_ids: "Iterable[str]") -> None:
        """Note that loads have ended, well or not."""
        for request_id in request_ids:
            if (state := self._requests.get(request_id)) is not None:
                state.loading.clear()

    # Inside.

    def _learn_keys(self, state: _Request) -> None:
        """Name the chunks whose tokens are known by now.

        A session that goes on with new input takes its last token back, and with it the hash of a
        block that was not computed yet. Hashes are chained, so what agrees at its end agrees whole.
        """
        hashes, per_chunk = state.request.block_hashes, self._shape.hashes
        known = len(hashes) // per_chunk
        while state.keys and (
            len(state.keys) > known or state.keys[-1] != self._key(hashes, len(state.keys) - 1)
        ):
            state.keys.pop()
            state.next_chunk = min(state.next_chunk, len(state.keys))
            if state.present is not None:
                state.present = min(state.present, len(state.keys))
        state.keys += [self._key(hashes, number) for number in range(len(state.keys), known)]

    def _key(self, hashes: "Sequence[bytes]", number: int) -> Key:
        last = hashes[(number + 1) * self._shape.hashes - 1]
        return Key(bytes(last) + GROUP.to_bytes(4, "big"))

    def _ask(self, state: _Request) -> None:
        if state.ticket is not None or not state.keys:
            if not state.keys:
                self._conclude(state, 0)
            return
        state.ticket = next(self._numbers)
        state.asked_s = self._clock.monotonic_s()
        self._finds[state.ticket] = _Find(state.request.request_id)
        self._orders.finds.append(FindOrder(ticket=state.ticket, keys=tuple(state.keys)))

    def _take_answer(self, rank: int, ticket: int, count: int) -> None:
        find = self._finds.get(ticket)
        if find is None:
            return  # Concluded before, or its request is gone.
        find.answers[rank] = count
        if find.answers.keys() >= self._ranks:
            state = self._requests.get(find.request_id)
            if state is not None and state.ticket == ticket:
                self._conclude(state, min(find.answers.values()))
            self._finds.pop(ticket, None)

    def _conclude(self, state: _Request, present: int) -> None:
        if state.ticket is not None:
            self._finds.pop(state.ticket, None)
        state.ticket = None
        state.present = present
        state.next_chunk = present

    def _offer(
        self,
        orders: StepOrders,
        state: _Request,
        scheduled_tokens: int,
        blocks_of: "Callable[[str], Sequence[int]]",
    ) -> None:
        """Order the stores of the chunks that this step completes, and of those before them."""
        if state.present is None:
            is_late = self._clock.monotonic_s() - state.asked_s > self._find_patience_s
            if not is_late:
                return  # The answer says which of them are stored already.
            self._conclude(state, 0)
        request = state.request
        self._learn_keys(state)
        computed = request.num_computed_tokens + scheduled_tokens
        if self._prompts_only:
            computed = min(computed, request.num_prompt_tokens)
        # A token that is still being sampled has no hash yet; its chunk is offered a step later.
        end = min(computed // self._shape.tokens, len(state.keys))
        if state.next_chunk >= end:
            return
        blocks, per_chunk = blocks_of(request.request_id), self._shape.blocks
        for number in range(state.next_chunk, end):
            store = next(self._numbers)
            state.outstanding[store] = set(self._ranks)
            self._stores[store] = request.request_id
            orders.stores.append(
                StoreOrder(
                    number=store,
                    request_id=request.request_id,
                    key=state.keys[number],
                    parent=state.keys[number - 1] if number else None,
                    end_token=(number + 1) * self._shape.tokens,
                    blocks=tuple(blocks[number * per_chunk : (number + 1) * per_chunk]),
                )
            )
        state.next_chunk = end

    def _settle(self, rank: int, number: int) -> None:
        state = self._requests.get(self._stores.get(number, ""))
        if state is None or number not in state.outstanding:
            return
        state.outstanding[number].discard(rank)
        if not state.outstanding[number]:
            del state.outstanding[number]
            del self._stores[number]

    def _forget_stores(self, state: _Request) -> None:
        for number in state.outstanding:
            del self._stores[number]
        state.outstanding.clear()
