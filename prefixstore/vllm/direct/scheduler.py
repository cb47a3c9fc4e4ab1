"""The scheduler's side of the direct path: books only, no I/O, nothing that waits.

For each request: which of its chunks the store holds (asked of the workers, since each rank has a part
of its own), which to load, and which to store when a step has computed them. A chunk counts as stored when
**every** rank says so.

A store may read its blocks after its request has ended or moved on: vLLM takes them back at once, and what
they hold stays until they are given to somebody. So each step tells the workers which stores it overwrites. A
request may even end before it is known which of its chunks the store holds: then the rest is ordered late.

vLLM calls all of this on its scheduler's thread.
"""

import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefixstore.keys import Key, kv_group
from prefixstore.vllm.direct.chunks import ChunkShape, chunk_step, is_kept, match_tokens
from prefixstore.vllm.direct.messages import (
    FindOrder,
    GroupFind,
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
    from prefixstore.vllm.direct.worth import MatchWorth

__all__ = ["DirectScheduler"]

logger = logging.getLogger("prefixstore")

NULL_BLOCK = 0
"""What vLLM has in a request's list where a block has left the window."""

READ_PATIENCE_S = 5.0
"""How long an engine without requests steps on for stores that see no progress."""


@dataclass(slots=True, eq=False)
class _Request:
    """What is remembered of one request, from its arrival to its end; lists have an entry for each group.

    Attributes:
        keys: Of its chunks, from the first.
        present: One byte a chunk, from the first: whether every rank holds it; None until all have said.
        ticket: Of the find that is under way.
        asked_s: When it was asked.
        local_tokens: What the engine's own cache held when it was last asked about.
        next_chunk: The first chunk that was not considered for storing.
        loading: Group and chunk under way, by each block it goes to; empty when none are.
        may_load: False once a load failed: what is missing is computed.
        pays: Whether its match is worth loading, once that was asked.
        load_most: Tokens to load at most; None: no limit.
        offload_most: Tokens from the first to store at most.
        last_stores: Of a request that has ended: what it computed, until its find is answered.
    """

    request: "Request"
    keys: list[list[Key]]
    next_chunk: list[int]
    present: list[bytearray] | None = None
    ticket: int | None = None
    asked_s: float = 0.0
    local_tokens: int = 0
    loading: dict[int, tuple[int, int]] = field(default_factory=dict)
    may_load: bool = True
    pays: bool | None = None
    load_most: int | None = None
    offload_most: int | None = None
    last_stores: list[StoreOrder] = field(default_factory=list)

    def holds(self, group: int, number: int) -> bool:
        """Whether the store was said to hold a chunk."""
        flags = self.present[group] if self.present is not None else b""
        return number < len(flags) and bool(flags[number])


@dataclass(slots=True)
class _Store:
    """A store under way: the blocks that it reads, and the ranks that have not read them yet."""

    blocks: tuple[int, ...]
    ranks: set[int]


@dataclass(slots=True)
class _Find:
    """A find under way: who asked, and what each rank has said."""

    state: _Request
    answers: dict[int, tuple[bytes, ...]] = field(default_factory=dict)


class DirectScheduler:
    """Books of the direct path. For one thread.

    Args:
        shapes: The chunks' of each KV group, in vLLM's order.
        ranks: How many workers each hold a part.
        find_patience_s: How long a request waits for the answer to a find; then nothing was found.
        interval: Every so many tokens windows are kept; 0: only where a prompt ends.
        prompts_only: Store no chunk with generated tokens.
        worth: Decides which matches are loaded; None: all.
    """

    def __init__(
        self,
        *,
        shapes: "Sequence[ChunkShape]",
        ranks: int,
        find_patience_s: float,
        clock: "Clock",
        interval: int = 0,
        prompts_only: bool = False,
        worth: "MatchWorth | None" = None,
    ) -> None:
        self._shapes = tuple(shapes)
        self._step = chunk_step(shapes)
        self._ranks = frozenset(range(ranks))
        self._find_patience_s = find_patience_s
        self._clock = clock
        self._interval = interval
        self._prompts_only = prompts_only
        self._worth = worth
        # vLLM cuts a request short at a failed block only where all blocks before it are kept.
        self._loads_whole = len(self._shapes) > 1 or self._shapes[0].window is not None
        self._requests: dict[str, _Request] = {}
        self._finds: dict[int, _Find] = {}
        self._ended: dict[int, _Request] = {}  # Ticket → one that waits for the answer to store.
        self._stores: dict[int, _Store] = {}
        self._readers: dict[int, set[int]] = {}  # Block → stores that still read it.
        self._moved_s = 0.0
        self._numbers = itertools.count(1)
        self._steps = 0
        self._ended_steps = dict.fromkeys(self._ranks, 0)
        self._orders = StepOrders()
        self._is_off = False

    def turn_off(self) -> None:
        """Neither find nor store any more; loads under way still end."""
        self._is_off = True
        self._finds.clear()
        for state in self._ended.values():
            for order in state.last_stores:
                self._forget_store(order.number)
        self._ended.clear()

    # A request's way.

    def add(self, request: "Request") -> None:
        """Take a request, or leave it alone.

        A hash knows an adapter by name only, and of embeddings neither their dtype nor which are used.
        """
        if request.lora_request is None and getattr(request, "prompt_embeds", None) is None:
            self._requests[request.request_id] = _Request(
                request,
                keys=[[] for _ in self._shapes],
                next_chunk=[0] * len(self._shapes),
                load_most=_limit(request, "max_load_tokens"),
                offload_most=_limit(request, "max_offload_tokens"),
            )

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
        loadable = (request.num_tokens - 1) // self._step * self._step
        if state.load_most is not None:
            loadable = min(loadable, local_tokens + state.load_most)
        if state.present is None:
            self._ask(state)
            if loadable <= local_tokens or request.skip_reading_prefix_cache:
                return 0
            if not self._is_late(state) and state.ticket is not None:
                return None
            self._conclude(state)
        assert state.present is not None, "answered, or concluded just now"
        if request.skip_reading_prefix_cache:
            return 0
        goal = match_tokens(
            self._shapes, state.present, local_tokens=local_tokens, most_tokens=loadable
        )
        return goal - local_tokens if self._pays(state, goal) else 0

    def allocate(self, request: "Request", blocks: "Sequence[Sequence[int]]", tokens: int) -> None:
        """Order the load of ``tokens`` past the engine's own into a request's blocks, by group."""
        if tokens == 0:
            return
        state = self._requests.get(request.request_id)
        assert state is not None, "a request that is not known was told no match"
        goal = state.local_tokens + tokens
        chunks: list[tuple[int, LoadChunk]] = []
        loading: dict[int, tuple[int, int]] = {}
        for group, shape in enumerate(self._shapes):
            per_block, per_chunk = shape.tokens_per_block, shape.blocks
            begin = max(state.local_tokens // per_block, shape.first_needed(goal) * per_chunk)
            end = goal // per_block
            for number in range(begin // per_chunk, -(-end // per_chunk)):
                first = max(begin, number * per_chunk)
                last = min(end, (number + 1) * per_chunk)
                wanted = tuple(blocks[group][first:last])
                assert len(wanted) == last - first, "vLLM allocates what it was promised"
                assert NULL_BLOCK not in wanted, f"chunk {number} of group {group} has no block"
                loading.update(dict.fromkeys(wanted, (group, number)))
                chunk = LoadChunk(
                    key=state.keys[group][number], blocks=wanted, first=first - number * per_chunk
                )
                chunks.append(((number + 1) * shape.tokens, chunk))
        state.loading = loading
        self.give_away(loading)
        chunks.sort(key=lambda pair: pair[0])
        self._orders.loads.append(
            LoadOrder(
                request_id=request.request_id,
                chunks=tuple(chunk for _, chunk in chunks),
                is_whole=self._loads_whole,
            )
        )

    def doom(self, request_id: str, blocks: "Sequence[Sequence[int]]", tokens: int) -> None:
        """Have a load reported as failed that could not be ordered: its request waits for a report."""
        self._orders.are_all_overwritten = True
        if (state := self._requests.get(request_id)) is not None:
            state.may_load = False
        # For a load that runs between steps, vLLM allocates what it is to bring and nothing behind.
        count = -(-tokens // self._shapes[0].tokens_per_block)
        self._orders.loads.append(
            LoadOrder(
                request_id=request_id,
                chunks=(),
                doomed=tuple(blocks[0][-count:]),
                is_whole=self._loads_whole,
            )
        )

    def leave_alone(self, request_id: str) -> None:
        """Neither find nor store for a request from now on."""
        if (state := self._requests.pop(request_id, None)) is not None:
            self._finds.pop(state.ticket or 0, None)

    def finish(self, request: "Request", blocks: "Sequence[Sequence[int]]") -> None:
        """Forget a request; what is to be stored of it is read until its blocks are given away.

        Args:
            request: The request.
            blocks: Those that it gives back, by group.
        """
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return
        if state.present is None and not state.loading and not self._is_off:
            self._offer_late(state, blocks)
        else:
            self._finds.pop(state.ticket or 0, None)
        if not self._is_off:
            self._orders.touched += itertools.chain.from_iterable(state.keys)

    def give_away(self, blocks: "Iterable[int]") -> None:
        """Note blocks that a step gives to a request, which overwrites them: no store may read them later."""
        for block in blocks:
            for number in [*self._readers.get(block, ())]:
                self._orders.overwritten.append(number)
                self._forget_store(number)

    @property
    def is_reading(self) -> bool:
        """Whether steps are worth taking for what workers still have to read, for a bounded time."""
        return bool(self._stores) and self._clock.monotonic_s() - self._moved_s < READ_PATIENCE_S

    # A step's way.

    def take_loads(self) -> StepOrders:
        """Begin the orders of a step with what must reach the workers whatever else fails."""
        while self._ended and self._is_late(state := next(iter(self._ended.values()))):
            self._conclude(state)
        orders, self._orders = self._orders, StepOrders()
        self._steps += 1
        orders.number = self._steps
        orders.proven = min(self._ended_steps.values())
        orders.is_off = self._is_off
        return orders

    def take_last_stores(self, ended_step: int) -> list[StoreOrder] | None:
        """Return the stores that no step will carry, since the engine ends.

        Args:
            ended_step: The last step that came through at the only worker.

        Returns:
            The stores; None where blocks may not hold what they held: a step failed, the cache was reset.
        """
        if self._is_off or ended_step != self._steps:
            return None
        for state in [*self._ended.values()]:
            self._conclude(state)
        return [order for order in self._orders.late_stores if order.number in self._stores]

    def plan(
        self,
        orders: StepOrders,
        *,
        scheduled_tokens: "dict[str, int]",
        blocks_of: "Callable[[str], Sequence[Sequence[int]]]",
        preempted: "Iterable[str]" = (),
    ) -> None:
        """Add a step's finds and stores to its orders.

        Args:
            orders: Of the step.
            scheduled_tokens: What it computes of each request.
            preempted: Requests that have lost their blocks.
            blocks_of: Returns a request's blocks, by group.
        """
        orders.is_idle = not scheduled_tokens
        if self._worth is not None and scheduled_tokens:
            self._worth.begin_step(scheduled_tokens)
        for request_id in preempted:
            state = self._requests.get(request_id)
            if state is not None and not state.loading:
                # What it has stored itself meanwhile is worth a new find when it is resumed.
                self._finds.pop(state.ticket or 0, None)
                state.ticket, state.present, state.pays = None, None, None
        if self._is_off:
            orders.finds.clear()
            return
        for request_id, tokens in scheduled_tokens.items():
            if (state := self._requests.get(request_id)) is not None:
                self._offer(orders, state, tokens, blocks_of)

    def take_report(self, report: StepReport) -> None:
        """Note what workers found, which blocks they no longer need, and what their loads took."""
        if self._worth is not None:
            self._worth.take_reports([*report.ranks.values()])
        for rank, part in report.ranks.items():
            self._ended_steps[rank] = max(self._ended_steps[rank], part.ended)
            for ticket, flags in part.found.items():
                self._take_answer(rank, ticket, flags)
            for number in part.settled:
                self._settle(rank, number)
            if part.is_off and not self._is_off:
                logger.warning("store is off: rank %d has none", rank)
                self.turn_off()

    def take_failures(self, blocks: "Iterable[int]", request_ids: "Iterable[str]" = ()) -> None:
        """Note loads that failed: their chunks are computed, and then stored again.

        Args:
            blocks: Those that were not loaded.
            request_ids: Requests of whose load nothing is used.
        """
        failed = set(blocks)
        for state in self._requests.values():
            self._lose(state, [state.loading[block] for block in failed & state.loading.keys()])
        for request_id in request_ids:
            if (known := self._requests.get(request_id)) is not None:
                known.may_load = False
                self._lose(known, list(known.loading.values()))

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
        hashes = state.request.block_hashes
        for group, (shape, keys) in enumerate(zip(self._shapes, state.keys, strict=True)):
            known = len(hashes) // shape.hashes
            while keys and (len(keys) > known or keys[-1] != _key(shape, hashes, len(keys) - 1)):
                keys.pop()
                state.next_chunk[group] = min(state.next_chunk[group], len(keys))
                if state.present is not None:
                    del state.present[group][len(keys) :]
            keys += [_key(shape, hashes, number) for number in range(len(keys), known)]

    def _ask(self, state: _Request) -> None:
        if not any(state.keys):
            self._conclude(state)
        if state.ticket is not None or not any(state.keys):
            return
        state.ticket = next(self._numbers)
        state.asked_s = self._clock.monotonic_s()
        self._finds[state.ticket] = _Find(state)
        groups = [
            GroupFind(keys=tuple(keys), chunk_tokens=shape.tokens, is_chained=shape.window is None)
            for shape, keys in zip(self._shapes, state.keys, strict=True)
        ]
        self._orders.finds.append(FindOrder(ticket=state.ticket, groups=tuple(groups)))

    def _pays(self, state: _Request, goal: int) -> bool:
        """Whether a request's match is worth loading; decided once, since vLLM may ask in many steps."""
        if state.pays is None and self._worth is not None and goal > state.local_tokens:
            chunks = [
                goal // shape.tokens
                - max(shape.first_needed(goal), state.local_tokens // shape.tokens)
                for shape in self._shapes
            ]
            state.pays = self._worth.pays(chunks, tokens=goal - state.local_tokens)
        return state.pays is not False

    def _take_answer(self, rank: int, ticket: int, flags: tuple[bytes, ...]) -> None:
        find = self._finds.get(ticket)
        if find is None:
            return  # Concluded before, or its request is gone.
        find.answers[rank] = flags
        if find.answers.keys() >= self._ranks:
            by_group = zip(*find.answers.values(), strict=True)
            # A rank that says less than the others holds no more.
            self._conclude(
                find.state,
                [bytearray(map(all, zip(*parts, strict=False))) for parts in by_group],
            )

    def _conclude(self, state: _Request, present: list[bytearray] | None = None) -> None:
        """End a request's find; by default nothing was found."""
        if state.ticket is not None:
            self._finds.pop(state.ticket, None)
            self._ended.pop(state.ticket, None)
        state.ticket = None
        state.present = present or [bytearray() for _ in self._shapes]
        state.next_chunk = [0] * len(self._shapes)
        last_stores, state.last_stores = state.last_stores, []
        for order in last_stores:
            group = kv_group(order.key)
            if state.holds(group, order.end_token // self._shapes[group].tokens - 1):
                self._forget_store(order.number)
            elif order.number in self._stores:  # Its blocks were not given away meanwhile.
                self._orders.late_stores.append(order)

    def _is_late(self, state: _Request) -> bool:
        return self._clock.monotonic_s() - state.asked_s > self._find_patience_s

    def _lose(self, state: _Request, places: "Iterable[tuple[int, int]]") -> None:
        """Note chunks that a load did not bring: from each on, what is computed is stored again."""
        for group, number in places:
            state.may_load = False
            if state.present is not None:
                del state.present[group][number:]
            state.next_chunk[group] = min(state.next_chunk[group], number)

    def _offer(
        self,
        orders: StepOrders,
        state: _Request,
        scheduled_tokens: int,
        blocks_of: "Callable[[str], Sequence[Sequence[int]]]",
    ) -> None:
        """Order the stores of the chunks that this step completes, and of those before them."""
        if state.present is None:
            if not self._is_late(state):
                return  # The answer says which of them are stored already.
            self._conclude(state)
        request = state.request
        computed = request.num_computed_tokens + scheduled_tokens
        orders.stores += self._make_stores(state, computed, lambda: blocks_of(request.request_id))

    def _offer_late(self, state: _Request, blocks: "Sequence[Sequence[int]]") -> None:
        """Order what an ended request has computed, once it is known which of that is stored already."""
        request = state.request
        # Steps under way may still be at the last of them.
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        state.next_chunk = [0] * len(self._shapes)
        state.last_stores = self._make_stores(state, computed, lambda: blocks)
        if state.ticket is None or not state.last_stores:
            self._conclude(state)
        else:
            self._ended[state.ticket] = state

    def _make_stores(
        self, state: _Request, computed: int, blocks_of: "Callable[[], Sequence[Sequence[int]]]"
    ) -> list[StoreOrder]:
        """Make the orders for what a request has newly computed."""
        request = state.request
        self._learn_keys(state)
        if self._prompts_only:
            computed = min(computed, request.num_prompt_tokens)
        if state.offload_most is not None:
            computed = min(computed, state.offload_most)
        stores = []
        blocks: Sequence[Sequence[int]] | None = None
        for group, (shape, keys) in enumerate(zip(self._shapes, state.keys, strict=True)):
            # A token that is still being sampled has no hash yet; its chunk is offered a step later.
            first, end = state.next_chunk[group], min(computed // shape.tokens, len(keys))
            state.next_chunk[group] = max(first, end)
            for number in range(first, end):
                if state.holds(group, number) or not self._keeps(state, shape, number):
                    continue
                blocks = blocks_of() if blocks is None else blocks
                row = blocks[group][number * shape.blocks : (number + 1) * shape.blocks]
                if NULL_BLOCK in row or len(row) < shape.blocks:
                    continue  # It has left the window; or not all of it is there to be read.
                stores.append(self._make_store(state, group, number, blocks=tuple(row)))
        # Parents before children, so that a crash leaves no gap.
        return sorted(stores, key=lambda store: store.end_token)

    def _keeps(self, state: _Request, shape: ChunkShape, number: int) -> bool:
        """Whether a chunk is worth storing."""
        if shape.window is None:
            return True
        request = state.request
        # As in vLLM's own cache: where the prompt ends, and where another was seen to part from it.
        ends = (request.num_prompt_tokens - 1, getattr(request, "shared_prefix_boundary", 0))
        return is_kept(
            shape,
            number,
            interval=self._interval,
            ends=[end // self._step * self._step for end in ends],
        )

    def _make_store(
        self, state: _Request, group: int, number: int, *, blocks: tuple[int, ...]
    ) -> StoreOrder:
        shape, keys = self._shapes[group], state.keys[group]
        store = next(self._numbers)
        self._stores[store] = _Store(blocks, set(self._ranks))
        self._moved_s = self._clock.monotonic_s()
        for block in blocks:
            self._readers.setdefault(block, set()).add(store)
        return StoreOrder(
            number=store,
            request_id=state.request.request_id,
            key=keys[number],
            parent=keys[number - 1] if number else None,
            end_token=(number + 1) * shape.tokens,
            blocks=blocks,
        )

    def _settle(self, rank: int, number: int) -> None:
        if (store := self._stores.get(number)) is not None:
            self._moved_s = self._clock.monotonic_s()
            store.ranks.discard(rank)
            if not store.ranks:
                self._forget_store(number)

    def _forget_store(self, number: int) -> None:
        store = self._stores.pop(number, None)
        for block in store.blocks if store is not None else ():
            readers = self._readers[block]
            readers.discard(number)
            if not readers:
                del self._readers[block]


def _key(shape: ChunkShape, hashes: "Sequence[bytes]", number: int) -> Key:
    last = hashes[(number + 1) * shape.hashes - 1]
    return Key(bytes(last) + shape.group.to_bytes(4, "big"))


def _limit(request: "Request", name: str) -> int | None:
    """Return a limit of the request's own, by vLLM's name and rules (offloading/scheduler.py)."""
    value = (request.kv_transfer_params or {}).get(name)
    return value if type(value) is int and value >= 0 else None
