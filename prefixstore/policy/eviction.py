"""Which chunks go when room is needed: a pure decision over what is known of them.

The rule, in the order of its clauses:

    1. Only chunks with refcount 0 go: no stored child, no pin, no transfer in flight.
    2. Of those, the one least recently used goes first; of one second, the deepest. That order is the
       default; it can be exchanged, so that others can be compared with it (docs/benchmarks/policy.md).
    3. Its parent then has a child less, and may be the next.
    4. Enough is enough: stop when the bytes asked for, of namespaces with a limit of their own and of
       the whole, are free and nothing left is too old.
    5. What such a namespace gives counts for the whole, too. What it should give and cannot, since
       the rest of it is pinned or busy, is found elsewhere.

So a prefix is eaten from its leaves, and no child outlives its parent:

    root ─ a ─ b ─ c        c, b and d are gone before a may go; root stays while a stays
            └─ d

Owns no clock, no index and no file: callers pass candidates and get a frozen plan, which is printed
(dry run) or carried out. A plan is true of the moment its candidates were read. Whoever carries it
out keeps its order, and looks once more at the refcount of each chunk before it goes.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId

__all__ = [
    "VICTIMS_MAX",
    "Candidate",
    "EvictionPlan",
    "EvictionReason",
    "Order",
    "Victim",
    "least_recently_used",
    "never_busy",
    "plan_eviction",
]

VICTIMS_MAX = 2**17
"""The longest plan, some 50 MB; more is freed by planning again after carrying it out."""

Address: TypeAlias = tuple[NamespaceId, Key]


class EvictionReason(StrEnum):
    """Why a chunk goes."""

    AGE = "age"
    """Nobody used it since the time given."""
    SPACE = "space"
    """Its bytes were asked for."""
    NAMESPACE = "namespace"
    """Its bytes were asked for of its namespace, which has a limit of its own."""


class Candidate(NamedTuple):
    """One stored chunk, as far as eviction is concerned.

    Attributes:
        namespace: The chunk's namespace.
        key: The chunk's key.
        parent: The key that has this chunk as a child, or None.
        file_bytes: What its removal frees; 0 if unknown.
        used_s: Whole seconds since the epoch.
        end_token: Its depth in tokens; 0 if unknown.
        children: Stored chunks whose parent it is.
        pins: Pins that hold it.
    """

    namespace: NamespaceId
    key: Key
    parent: Key | None
    file_bytes: int
    used_s: int
    end_token: int
    children: int
    pins: int

    @property
    def address(self) -> Address:
        """The chunk's name within the root."""
        return self.namespace, self.key


Rank: TypeAlias = tuple[float, int, NamespaceId, Key]
Order: TypeAlias = Callable[[Candidate], Rank]
"""Gives a chunk its place among those that may go: the smallest goes first."""


def least_recently_used(candidate: Candidate) -> Rank:
    """Order by recency; of one second, the deepest goes first.

    The default, and the order in which an index yields its rows. The orders that it was compared with
    are in ``tools/benchmarks/policy_orders.py``.
    """
    return candidate.used_s, -candidate.end_token, candidate.namespace, candidate.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """One chunk of a plan."""

    namespace: NamespaceId
    key: Key
    file_bytes: int
    used_s: int
    reason: EvictionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPlan:
    """What to remove, in this order.

    Attributes:
        victims: Children before their parents.
        file_bytes: What all of it frees, by the sizes that are known.
        short_bytes: What was asked for and cannot be freed, or not by this plan: of the whole or of
            namespaces, whichever is more, since their bytes count for both.
        truncated: ``victims_max`` ended the plan; another one would find more.
    """

    victims: tuple[Victim, ...]
    file_bytes: int
    short_bytes: int
    truncated: bool


def never_busy(_namespace: NamespaceId, _key: Key) -> bool:
    """Say that no transfer is in flight, for callers that have none."""
    return False


def plan_eviction(
    candidates: Iterable[Candidate],
    *,
    find: Callable[[NamespaceId, Key], Candidate | None],
    order: Order = least_recently_used,
    busy: Callable[[NamespaceId, Key], bool] = never_busy,
    free_bytes: int = 0,
    free_by_namespace: Mapping[NamespaceId, int] | None = None,
    used_before_s: int = 0,
    victims_max: int = VICTIMS_MAX,
) -> EvictionPlan:
    """Choose chunks until ``free_bytes`` are found and nothing evictable is older than allowed.

    The work is one pass over ``candidates``, up to the last victim, and one or two ``find``
    for each parent of a victim.

    Args:
        candidates: Every chunk once, sorted by ``order``.
        find: Returns the same chunk by its name, or None if it is not stored.
        order: Who goes first of those that may.
        busy: Says whether a transfer is in flight from or to a chunk. Who stores a chunk holds its
            parent busy, too, until the child is among the candidates.
        free_bytes: How many bytes to free.
        free_by_namespace: How many of them, or more than that, certain namespaces have to give.
        used_before_s: Chunks that nobody used since then go whatever their size; 0 for none. Takes
            the order of recency.
        victims_max: Where the plan ends at the latest.

    Raises:
        InvalidError: A limit is negative, or there is an age without the order of recency.
    """
    need = _Need(free_bytes, free_by_namespace or {})
    if min(free_bytes, used_before_s, victims_max, *need.own.values()) < 0:
        raise InvalidError(
            f"eviction limits are not negative: free_bytes {free_bytes}, of namespaces {need.own}, "
            f"used_before_s {used_before_s}, victims_max {victims_max}"
        )
    if used_before_s and order is not least_recently_used:
        raise InvalidError("an age limit takes the order of recency: others do not end at an age")
    victims: list[Victim] = []
    queue = Queue(candidates, order=order, find=find, busy=busy)
    truncated = _choose(queue, need, victims, used_before_s=used_before_s, victims_max=victims_max)
    if not truncated and need.ask_elsewhere():
        queue.give_back(need.spared)
        truncated = _choose(
            queue, need, victims, used_before_s=used_before_s, victims_max=victims_max
        )
    return EvictionPlan(
        victims=tuple(victims),
        file_bytes=sum(victim.file_bytes for victim in victims),
        short_bytes=need.short_bytes,
        truncated=truncated,
    )


def _choose(
    queue: "Queue", need: "_Need", victims: list[Victim], *, used_before_s: int, victims_max: int
) -> bool:
    """Add victims until nothing is needed, or nothing is left; return whether the plan was full before."""
    while (candidate := queue.pop()) is not None:
        too_old = candidate.used_s < used_before_s
        if not too_old and not need.any:
            # Whatever is left is as young or younger, or has no age to go by.
            return False
        if len(victims) == victims_max:
            return True
        reason = need.take(candidate, EvictionReason.AGE if too_old else None)
        if reason is None:
            need.spare(candidate, victims_max=victims_max)
            continue
        victims.append(
            Victim(
                namespace=candidate.namespace,
                key=candidate.key,
                file_bytes=candidate.file_bytes,
                used_s=candidate.used_s,
                reason=reason,
            )
        )
        queue.release_parent(candidate)
    return False


class _Need:
    """What is still to be freed: of some namespaces, and of anything besides.

    Attributes:
        own: What namespaces still have to give.
        rest_bytes: What is to be found besides, for the whole.
        spared: Chunks that nobody asked for, the first of their order: enough to stand in for what the
            namespaces are counted on to give.
    """

    def __init__(self, free_bytes: int, own: Mapping[NamespaceId, int]) -> None:
        self.own = dict(own)
        # What the namespaces give by themselves need not be found elsewhere.
        self.rest_bytes = max(0, free_bytes - sum(self.own.values()))
        self.spared: list[Candidate] = []
        self._whole_bytes = free_bytes
        self._counted_on_bytes = free_bytes - self.rest_bytes

    @property
    def any(self) -> bool:
        """Whether anything is still asked for."""
        return self.rest_bytes > 0 or any(wanted > 0 for wanted in self.own.values())

    @property
    def short_bytes(self) -> int:
        """What was not found."""
        return max(self._whole_bytes, sum(self.own.values()))

    def take(self, candidate: Candidate, reason: EvictionReason | None) -> EvictionReason | None:
        """Count a chunk that may go; return why it goes, None if nobody asks for it.

        Args:
            candidate: The chunk.
            reason: Why it goes in any case; None if only its bytes can be the reason.
        """
        wanted = self.own.get(candidate.namespace, 0)
        if wanted > 0:
            self.own[candidate.namespace] = max(0, wanted - candidate.file_bytes)
            reason = reason or EvictionReason.NAMESPACE
        elif self.rest_bytes > 0:
            self.rest_bytes = max(0, self.rest_bytes - candidate.file_bytes)
            reason = reason or EvictionReason.SPACE
        if reason is not None:
            self._whole_bytes = max(0, self._whole_bytes - candidate.file_bytes)
            self.rest_bytes = min(self.rest_bytes, self._whole_bytes)
        return reason

    def spare(self, candidate: Candidate, *, victims_max: int) -> None:
        """Keep a chunk that nobody asks for, in case a namespace cannot give what it should."""
        # One more than a plan holds, so that it is told from one that has found all there is.
        if self._counted_on_bytes > 0 and len(self.spared) <= victims_max:
            self._counted_on_bytes -= candidate.file_bytes
            self.spared.append(candidate)

    def ask_elsewhere(self) -> bool:
        """Ask anyone for what the namespaces could not give; return whether the whole needs that."""
        if not self.any or not self._whole_bytes:
            return False
        self.rest_bytes = self._whole_bytes
        return True


class Queue:
    """Evictable chunks in their order, including those that became so on the way.

    Joins two sources: the candidates, where a chunk with children is passed over, and a heap of
    chunks that lost their last child after they had been passed. Memory grows with the victims, not
    with the candidates.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        *,
        order: Order,
        find: Callable[[NamespaceId, Key], Candidate | None],
        busy: Callable[[NamespaceId, Key], bool],
    ) -> None:
        self._stream = iter(candidates)
        self._order = order
        self._find = find
        self._busy = busy
        self._head = next(self._stream, None)
        self._freed: list[tuple[Rank, Candidate]] = []
        self._children_left: dict[Address, int] = {}

    def pop(self) -> Candidate | None:
        """Take the next evictable chunk, or None when there is none left."""
        while True:
            if self._freed and (self._head is None or self._freed[0][0] <= self._order(self._head)):
                _, candidate = heapq.heappop(self._freed)
            elif self._head is not None:
                candidate, self._head = self._head, next(self._stream, None)
                # Children left are counted for chunks that wait in the heap, went through it, or
                # will come to it: the stream must not offer them a second time.
                if candidate.children or candidate.address in self._children_left:
                    continue
            else:
                return None
            if not candidate.pins and not self._busy(*candidate.address):
                return candidate

    def give_back(self, candidates: Iterable[Candidate]) -> None:
        """Offer chunks once more that were taken and not chosen."""
        for candidate in candidates:
            heapq.heappush(self._freed, (self._order(candidate), candidate))

    def release_parent(self, candidate: Candidate) -> None:
        """Count a chosen chunk off its parent, which becomes evictable with its last child."""
        if candidate.parent is None:
            return
        address = (candidate.namespace, candidate.parent)
        parent = None
        if address not in self._children_left:
            parent = self._find(*address)
            if parent is None:
                return
            self._children_left[address] = parent.children
        self._children_left[address] -= 1
        if self._children_left[address] == 0:
            parent = parent or self._find(*address)
            if parent is not None:
                heapq.heappush(self._freed, (self._order(parent), parent))
