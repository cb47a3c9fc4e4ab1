"""Which chunks to keep: eviction orders compared by simulation, through the very function that plans.

Requests of a made-up trace (``policy_traces``) are replayed on a store of a given size. A request uses
the longest stored prefix of its prompt, then stores what was missing, answer included. When the store is
95 % full, ``prefixstore.policy.eviction.plan_eviction`` frees it to 85 %, as a collector does; only the
order is exchanged (``policy_orders``). Refcounts hold in every run: no child outlives its parent.

Savings are counted in the second half of a trace, when the store is full. The prefill seconds are those of
a model of 8 billion weights on 400 TFLOP/s: 16 GFLOP a token and attention that grows with depth.
"""

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.policy_orders import ORDERS, Ordering, chunk_cost_s, node_of
from benchmarks.policy_traces import CHUNK_TOKENS, WORKLOADS, Trace, make_trace
from benchmarks.report import Report, Table, describe_machine
from prefixstore.keys import Key, NamespaceId
from prefixstore.policy.eviction import Candidate, plan_eviction

NAMESPACE = NamespaceId("5e" * 16)
CHUNK_BYTES = CHUNK_TOKENS * 131072
"""KV of a model of 8 billion weights: 32 layers, 8 KV heads of 128, two bytes each."""
HIGH_SHARE, LOW_SHARE = 0.95, 0.85
"""Where a collector begins and ends; see ``prefixstore.store.space``."""

EVEN = 0.005
"""Runs that differ by less are called even."""


@dataclass(slots=True)
class Savings:
    """What a run saved of what its prompts asked for; shares are of 1."""

    chunks_asked: int = 0
    chunks_hit: int = 0
    cost_s: float = 0.0
    saved_s: float = 0.0

    @property
    def hit_share(self) -> float:
        """Chunks found, of the chunks of all prompts."""
        return self.chunks_hit / max(1, self.chunks_asked)

    @property
    def saved_share(self) -> float:
        """Prefill seconds saved, of those that a store of endless size would save at most: all."""
        return self.saved_s / max(1e-9, self.cost_s)


class Simulation:
    """A store of ``capacity_chunks`` with one order."""

    def __init__(self, trace: Trace, ordering: Ordering, *, capacity_chunks: int) -> None:
        self.trace = trace
        self.ordering = ordering
        self.capacity_chunks = capacity_chunks
        self.used_s: dict[int, int] = {}
        self.children: dict[int, int] = {}
        self.now_s = 0.0
        self.evictions = 0

    def run(self) -> Savings:
        """Replay the trace."""
        savings = Savings()
        count_from_s = self.trace.requests[-1].at_s / 2
        for request in self.trace.requests:
            self.now_s = request.at_s
            prompt = self.trace.path(request.prompt)
            hits = next((at for at, n in enumerate(prompt) if n not in self.used_s), len(prompt))
            if request.at_s >= count_from_s:
                costs_s = [chunk_cost_s((at + 1) * CHUNK_TOKENS) for at in range(len(prompt))]
                savings.chunks_asked += len(prompt)
                savings.chunks_hit += hits
                savings.cost_s += sum(costs_s)
                savings.saved_s += sum(costs_s[:hits])
            self.serve(self.trace.path(request.end))
        return savings

    def serve(self, path: list[int]) -> None:
        """Use what is there of a path, then store the rest, parents first."""
        there = [node for node in path if node in self.used_s]
        self.use(there)
        for node in path[len(there) :]:
            if len(self.used_s) >= self.capacity_chunks * HIGH_SHARE:
                self.evict(busy=self.trace.parents[node])
            if len(self.used_s) >= self.capacity_chunks:
                return
            self.children[node] = 0
            if (parent := self.trace.parents[node]) >= 0:
                self.children[parent] += 1
            self.use([node])

    def use(self, nodes: list[int]) -> None:
        """Note a use of chunks that are stored."""
        self.used_s.update(dict.fromkeys(nodes, int(self.now_s)))
        self.ordering.used(nodes, self.now_s)

    def evict(self, *, busy: int) -> None:
        """Free the store down to the low mark."""
        order = self.ordering.order_at(self.now_s)
        candidates = sorted(self.candidates(), key=order)
        excess = len(self.used_s) - int(self.capacity_chunks * LOW_SHARE)
        plan = plan_eviction(
            candidates,
            find=lambda _, key: self.candidate(int.from_bytes(key, "big")),
            order=order,
            busy=lambda _, key: int.from_bytes(key, "big") == busy,
            free_bytes=excess * CHUNK_BYTES,
        )
        gone = [self.candidate(int.from_bytes(victim.key, "big")) for victim in plan.victims]
        self.ordering.evicted(gone)
        for candidate in gone:
            node = node_of(candidate)
            assert self.children.pop(node) == 0, f"{node} went before its children"
            del self.used_s[node]
            if (parent := self.trace.parents[node]) >= 0:
                self.children[parent] -= 1
        self.evictions += 1

    def candidates(self) -> Iterable[Candidate]:
        """Return every stored chunk as eviction looks at it."""
        return map(self.candidate, self.used_s)

    def candidate(self, node: int) -> Candidate:
        """Return one stored chunk as eviction looks at it."""
        parent = self.trace.parents[node]
        return Candidate(
            namespace=NAMESPACE,
            key=key_of(node),
            parent=key_of(parent) if parent >= 0 else None,
            file_bytes=CHUNK_BYTES,
            used_s=self.used_s[node],
            end_token=self.trace.depths[node] * CHUNK_TOKENS,
            children=self.children[node],
            pins=0,
        )


def key_of(node: int) -> Key:
    """Return a key that tells the node."""
    return Key(node.to_bytes(12, "big"))


def compare(trace: Trace, capacity_chunks: int) -> dict[str, Savings]:
    """Run every order over one trace."""
    return {
        name: Simulation(trace, ordering(trace), capacity_chunks=capacity_chunks).run()
        for name, ordering in ORDERS.items()
    }


def report_on(options: argparse.Namespace) -> Report:
    """Run all workloads at all sizes."""
    report = Report(about=__doc__ or "", machine=describe_machine(Path.cwd()))
    rows: list[tuple[str, dict[str, Savings]]] = []
    for workload in options.workloads:
        trace = make_trace(workload, seed=options.seed, duration_s=options.hours * 3600)
        chunks = len({node for request in trace.requests for node in trace.path(request.end)})
        report.notes.append(
            f"{workload}: {len(trace.requests)} requests in {options.hours:g} h over {chunks} chunks of "
            f"{CHUNK_TOKENS} tokens, {chunks * CHUNK_BYTES / 1e12:.2f} TB if all were kept."
        )
        for share in options.sizes:
            savings = compare(trace, int(chunks * share / 100))
            rows.append((f"{workload}, {share:g} %", savings))
            for name, found in savings.items():
                report.measurements.append(
                    {"workload": workload, "size_percent": share, "order": name}
                    | {"hit_share": found.hit_share, "saved_share": found.saved_share}
                    | {"tokens": found.chunks_hit * CHUNK_TOKENS, "saved_s": found.saved_s}
                )
    columns = ("workload, size", *ORDERS)
    for title, cell in (
        ("chunk hit rate, %", lambda found: f"{100 * found.hit_share:.1f}"),
        ("tokens saved, millions", lambda found: f"{found.chunks_hit * CHUNK_TOKENS / 1e6:.2f}"),
        ("prefill seconds saved, %", lambda found: f"{100 * found.saved_share:.1f}"),
        ("prefill seconds saved", lambda found: f"{found.saved_s:.0f}"),
    ):
        cells = [(name, *(cell(savings[order]) for order in ORDERS)) for name, savings in rows]
        report.tables.append(Table(title=title, columns=columns, rows=cells))
    report.tables.append(summary([savings for _, savings in rows]))
    report.notes.append("Sizes are of all bytes that the trace touches.")
    return report


def summary(runs: list[dict[str, Savings]]) -> Table:
    """Compare each order with LRU over all runs, by prefill seconds saved."""
    rows = []
    for name in ORDERS:
        ratios = [run[name].saved_s / run["LRU"].saved_s for run in runs]
        rows.append(
            (
                name,
                f"{statistics.geometric_mean(ratios):.3f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{sum(ratio > 1 + EVEN for ratio in ratios)}",
                f"{sum(ratio < 1 - EVEN for ratio in ratios)}",
            )
        )
    columns = ("order", "of LRU, mean", "lowest-highest", "runs better", "runs worse")
    return Table(title="prefill seconds saved, of what LRU saves", columns=columns, rows=rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--sizes", nargs="+", type=float, default=[2.0, 5.0, 10.0, 25.0, 50.0])
    parser.add_argument("--hours", type=float, default=2.0, help="how long a trace is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write every measurement to FILE")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of text")
    options = parser.parse_args()
    report_on(options).publish(options)


if __name__ == "__main__":
    main()
