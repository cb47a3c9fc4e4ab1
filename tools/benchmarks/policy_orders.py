"""The orders that ``tools/bench policy`` compares: who goes first of the chunks that may go.

Each is a class with two methods: ``used`` hears of every use of a chunk, ``order_at`` gives the order to
plan by at a moment. What a chunk's recompute costs is ``chunk_cost_s``; all chunks of a trace have the
same bytes, so cost for each byte is cost.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from benchmarks.policy_traces import CHUNK_TOKENS, Trace
from prefixstore.policy.eviction import Candidate, Order, least_recently_used

__all__ = ["ORDERS", "Ordering", "chunk_cost_s", "node_of"]

LINEAR_S = 16e9 / 400e12
"""One token through the matrices of a model of 8 billion weights, on 400 TFLOP/s."""
ATTENTION_S = 4 * 32 * 4096 / 400e12
"""One token's attention to one token before it: 32 layers, 4096 wide, queries times keys and weights
times values."""

CREDIT_S = 300.0
"""How much younger a chunk looks that costs twice as much as the first one."""


def chunk_cost_s(end_token: int) -> float:
    """Return the seconds of prefill that a chunk saves: attention grows with depth, the rest does not."""
    return CHUNK_TOKENS * (LINEAR_S + ATTENTION_S * (end_token - CHUNK_TOKENS / 2))


def node_of(candidate: Candidate) -> int:
    """Return the trace's number of a chunk."""
    return int.from_bytes(candidate.key, "big")


class Ordering(Protocol):
    """One policy over one run."""

    def __init__(self, trace: Trace) -> None:
        """Begin with an empty store."""
        ...

    def used(self, nodes: Sequence[int], at_s: float) -> None:
        """Hear that the chunks of a request were stored or of use."""
        ...

    def order_at(self, at_s: float) -> Order:
        """Return the order to plan by now."""
        ...

    def evicted(self, candidates: Sequence[Candidate]) -> None:
        """Hear what went."""
        ...


class LeastRecent:
    """The default: least recently used."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def used(self, nodes: Sequence[int], at_s: float) -> None:
        """Candidates say when they were used."""

    def order_at(self, at_s: float) -> Order:  # noqa: ARG002 - others need the time
        """Return the order of production, the very function."""
        return least_recently_used

    def evicted(self, candidates: Sequence[Candidate]) -> None:
        """Nothing to keep."""


class GreedyDual(LeastRecent):
    """Credit of a chunk's cost on top of what the last victim had, renewed at each use."""

    counts_uses = False

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.floor_s = 0.0
        self.credit_s: dict[int, float] = {}
        self.uses: dict[int, int] = defaultdict(int)

    def used(self, nodes: Sequence[int], at_s: float) -> None:  # noqa: ARG002 - as above
        """Renew the credit."""
        for node in nodes:
            self.uses[node] += 1
            times = self.uses[node] if self.counts_uses else 1
            cost_s = chunk_cost_s(self.trace.depths[node] * CHUNK_TOKENS)
            self.credit_s[node] = self.floor_s + times * cost_s

    def order_at(self, at_s: float) -> Order:  # noqa: ARG002 - as above
        """Smallest credit first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            credit_s = self.credit_s[node_of(candidate)]
            return credit_s, -candidate.end_token, candidate.namespace, candidate.key

        return order

    def evicted(self, candidates: Sequence[Candidate]) -> None:
        """Raise the floor to what went last."""
        credits_s = [self.credit_s[node_of(candidate)] for candidate in candidates]
        self.floor_s = max([self.floor_s, *credits_s])
        for candidate in candidates:
            self.uses.pop(node_of(candidate), None)


class GreedyDualFrequency(GreedyDual):
    """The same with a credit of the cost times the uses."""

    counts_uses = True


class CostOverAge(LeastRecent):
    """What a chunk saves, over the time since it was used: no state but recency."""

    def order_at(self, at_s: float) -> Order:
        """Smallest saving for each second of age first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            saving = chunk_cost_s(candidate.end_token) / (1 + at_s - candidate.used_s)
            return saving, -candidate.end_token, candidate.namespace, candidate.key

        return order


class DepthCredit(LeastRecent):
    """Recency, with a credit of seconds for what depth adds to a chunk's cost: fixed until the next use."""

    def order_at(self, at_s: float) -> Order:  # noqa: ARG002 - as above
        """Smallest time of use plus credit first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            more = chunk_cost_s(candidate.end_token) / chunk_cost_s(CHUNK_TOKENS) - 1
            used_s = candidate.used_s + CREDIT_S * more
            return used_s, -candidate.end_token, candidate.namespace, candidate.key

        return order


class DepthOverAge(LeastRecent):
    """The other way round: deep chunks first, since fewer prompts share them."""

    def order_at(self, at_s: float) -> Order:
        """Greatest age times depth first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            weight = (1 + at_s - candidate.used_s) * candidate.end_token
            return -weight, -candidate.end_token, candidate.namespace, candidate.key

        return order


class SecondLastUse(LeastRecent):
    """LRU-2: by the use before the last; chunks that were used once go first, the oldest of them first."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.last: dict[int, float] = {}
        self.before: dict[int, float] = {}

    def used(self, nodes: Sequence[int], at_s: float) -> None:
        """Move the last use to the one before."""
        for node in nodes:
            if node in self.last:
                self.before[node] = self.last[node]
            self.last[node] = at_s

    def order_at(self, at_s: float) -> Order:  # noqa: ARG002 - as above
        """Oldest use but one first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            before = self.before.get(node_of(candidate), candidate.used_s - 1e9)
            return before, -candidate.end_token, candidate.namespace, candidate.key

        return order


class NextUse(LeastRecent):
    """Knows the future: the chunk that is needed last goes first. No policy can, so it is the bound."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.uses: dict[int, list[float]] = defaultdict(list)
        for request in trace.requests:
            for node in trace.path(request.prompt):
                self.uses[node].append(request.at_s)

    def order_at(self, at_s: float) -> Order:
        """Latest next use first."""

        def order(candidate: Candidate) -> tuple[float, int, str, bytes]:
            uses = self.uses[node_of(candidate)]
            at = bisect_right(uses, at_s)
            next_s = uses[at] if at < len(uses) else float("inf")
            return -next_s, -candidate.end_token, candidate.namespace, candidate.key

        return order


ORDERS: dict[str, type[Ordering]] = {
    "LRU": LeastRecent,
    "GreedyDual": GreedyDual,
    "GreedyDual x uses": GreedyDualFrequency,
    "cost / age": CostOverAge,
    "depth credit": DepthCredit,
    "deep first": DepthOverAge,
    "LRU-2": SecondLastUse,
    "knows the future": NextUse,
}
