"""Made-up request traces over a tree of prefixes; the same seed gives the same trace.

A prompt is a path from the root of a tree of chunks, as a KV cache sees it: what two prompts begin with
in common is stored once. Four workloads, each with its own reason why caches are hard:

    chat        system prompts of Zipf popularity, conversations that grow turn by turn and end at some
                point unannounced; the longer a conversation is, the more its next turn is worth
    documents   long documents of Zipf popularity with several questions each, among documents that
                nobody asks for twice
    agents      contexts that grow to tens of thousands of tokens by quick steps, that fork into
                sub-agents which share the trunk, and that are never seen again
    mixed       all of them at once on one store

Traces are synthetic: they are to rank policies, not to foretell a hit rate.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = ["CHUNK_TOKENS", "WORKLOADS", "Request", "Trace", "make_trace"]

CHUNK_TOKENS = 256
"""Tokens in one chunk: 16 blocks of 16."""
LONG_RUN_STEPS = 10
FORK_SHARE = 0.1
"""How often a long run of an agent forks."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        at_s: When, in seconds since the trace began.
        prompt: The node that the prompt ends with.
        end: The node that prompt and answer end with; what the engine stores ends here.
    """

    at_s: float
    prompt: int
    end: int


@dataclass(slots=True)
class Trace:
    """Requests in the order of time, over a tree of chunks numbered from 0.

    Attributes:
        parents: Each node's parent, -1 for a first chunk.
        depths: Each node's place in its prompt, from 1.
        requests: The requests.
    """

    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def grow(self, node: int, tokens: float) -> int:
        """Put new chunks for so many tokens, at least one, behind a node; return the last."""
        for _ in range(max(1, round(tokens / CHUNK_TOKENS))):
            self.parents.append(node)
            self.depths.append(1 if node < 0 else self.depths[node] + 1)
            node = len(self.parents) - 1
        return node

    def path(self, node: int) -> list[int]:
        """Return the nodes from the first chunk to ``node``."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


Session = Iterator[Request]
Workload = Callable[..., list[Session]]


def make_trace(workload: str, *, seed: int, duration_s: float, rate: float | None = None) -> Trace:
    """Return a trace; sessions begin within ``duration_s`` and their requests are cut off there.

    Args:
        workload: A name of ``WORKLOADS``.
        seed: Of the random numbers.
        duration_s: How long the trace is.
        rate: Sessions a second instead of the workload's own.
    """
    # Repeatable, and no secret.
    rng = random.Random(f"{workload}/{seed}")  # noqa: S311
    trace = Trace()
    rates = {} if rate is None else {"rate": rate}
    sessions = WORKLOADS[workload](trace, rng, duration_s, **rates)
    for request in heapq.merge(*sessions, key=lambda request: request.at_s):
        if request.at_s >= duration_s:
            break
        trace.requests.append(request)
    return trace


def chat(
    trace: Trace, rng: random.Random, duration_s: float, *, rate: float = 0.25
) -> list[Session]:
    """Conversations of 1 to 30 turns below one of 40 system prompts."""
    prompts = [trace.grow(-1, rng.lognormvariate(math.log(1500), 0.7)) for _ in range(40)]

    def converse(start_s: float, node: int) -> Session:
        at_s = start_s
        # A third ask once; the others go on, and some for very long.
        turns = 1 if rng.random() < 1 / 3 else min(30, 1 + int(rng.expovariate(1 / 5)))
        for _ in range(turns):
            prompt = trace.grow(node, rng.lognormvariate(math.log(300), 0.9))
            node = trace.grow(prompt, rng.lognormvariate(math.log(400), 0.6))
            yield Request(at_s, prompt, node)
            # People read and type for a minute; some come back after lunch.
            at_s += 10 + rng.lognormvariate(math.log(50), 1.2)

    return [
        converse(start_s, rng.choices(prompts, zipf(len(prompts), 1.1))[0])
        for start_s in arrivals(rng, duration_s, rate)
    ]


def documents(
    trace: Trace, rng: random.Random, duration_s: float, *, rate: float = 0.12
) -> list[Session]:
    """Questions about 120 known documents, and as many documents that are read once."""
    system = trace.grow(-1, 1000)
    known = [trace.grow(system, document_tokens(rng)) for _ in range(120)]

    def ask(start_s: float, document: int) -> Session:
        at_s = start_s
        for _ in range(1 + int(rng.expovariate(1 / 1.5))):
            prompt = trace.grow(document, rng.lognormvariate(math.log(150), 0.5))
            yield Request(at_s, prompt, trace.grow(prompt, 300))
            at_s += 5 + rng.lognormvariate(math.log(40), 1.0)

    def skim(start_s: float) -> Session:
        prompt = trace.grow(system, document_tokens(rng))
        yield Request(start_s, prompt, trace.grow(prompt, 500))

    return [
        ask(start_s, rng.choices(known, zipf(len(known), 0.9))[0])
        if rng.random() < 1 / 2
        else skim(start_s)
        for start_s in arrivals(rng, duration_s, rate)
    ]


def agents(
    trace: Trace, rng: random.Random, duration_s: float, *, rate: float = 0.012
) -> list[Session]:
    """Runs of 5 to 60 steps over one of six tool descriptions; a tenth of the steps fork."""
    tools = [trace.grow(-1, rng.uniform(4000, 12000)) for _ in range(6)]

    def run(start_s: float, node: int, steps: int) -> Session:
        at_s = start_s
        forks: list[Session] = []
        main: list[Request] = []
        for _ in range(steps):
            prompt = trace.grow(node, rng.lognormvariate(math.log(900), 0.8))
            node = trace.grow(prompt, 250)
            main.append(Request(at_s, prompt, node))
            at_s += 4 + rng.expovariate(1 / 8)
            if steps > LONG_RUN_STEPS and rng.random() < FORK_SHARE:
                forks.append(run(at_s, node, rng.randint(3, 8)))
                at_s += 60
        yield from heapq.merge(main, *forks, key=lambda request: request.at_s)

    return [
        run(start_s, rng.choices(tools, zipf(len(tools), 0.8))[0], rng.randint(5, 60))
        for start_s in arrivals(rng, duration_s, rate)
    ]


def mixed(
    trace: Trace, rng: random.Random, duration_s: float, *, rate: float = 0.12
) -> list[Session]:
    """All of them, on one store."""
    return [
        *chat(trace, rng, duration_s, rate=rate),
        *documents(trace, rng, duration_s, rate=0.4 * rate),
        *agents(trace, rng, duration_s, rate=0.04 * rate),
    ]


WORKLOADS: dict[str, Workload] = {
    "chat": chat,
    "documents": documents,
    "agents": agents,
    "mixed": mixed,
}


def arrivals(rng: random.Random, duration_s: float, rate: float) -> Iterator[float]:
    """Yield times of independent arrivals, ``rate`` a second."""
    at_s = rng.expovariate(rate)
    while at_s < duration_s:
        yield at_s
        at_s += rng.expovariate(rate)


def zipf(count: int, exponent: float) -> list[float]:
    """Return the weights of ``count`` things by popularity."""
    return [1 / (place**exponent) for place in range(1, count + 1)]


def document_tokens(rng: random.Random) -> float:
    """Return the length of a document: 2,000 to 64,000 tokens, most some 12,000."""
    return min(64000, max(2000, rng.lognormvariate(math.log(12000), 0.8)))
