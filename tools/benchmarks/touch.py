"""What keeping recency costs: touches on disk beside the loads and stores of the requests that cause them.

An hour of conversations (``policy_traces``) is replayed on a real store, its clock set to the times of the
trace: each request looks its prompt up, loads what is stored, stores the rest, answer included, and touches
its whole chain. Every call on the filesystem is timed at the seam; the touches are ``utime`` calls of a
background thread, at most one for each chunk in ``touch_interval_s``. The share is the time in them, of the
time in all other calls.

The interval of 0 touches every chunk at every use: what sampling saves.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.policy_traces import Trace, make_trace
from benchmarks.report import Report, Table, add_report_options, describe_machine
from prefixstore.config import StoreConfig
from prefixstore.store import Chunk, PrefixStore
from prefixstore.store.values import Loaded
from prefixstore.testing.chains import FIELDS, chain
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.osfs import Os, RealOs
from tests.sharedfs.gluster import Volume, clear_dead_mounts, is_installed

INTERVALS_S = (1200.0, 600.0, 0.0)
CHUNK_BYTES = (368_640, 2_949_120)
"""16 tokens of a model of 135M weights and 128 of them; small chunks are the dear ones to touch."""


class TimedOs:
    """The machine's filesystem; adds up the time in each call by its name. One thread at a time."""

    def __init__(self) -> None:
        self._inner = RealOs()
        self.spent_s: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._inner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spent_s[name] += time.perf_counter() - started_s
                self.calls[name] += 1

        return timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one replay did, and the time in its calls."""

    loaded: int
    stored: int
    touches: int
    touch_s: float
    other_s: float

    @property
    def share(self) -> float:
        """The time in touches, of the time in all other calls."""
        return self.touch_s / self.other_s


class Replay:
    """A trace on a real store."""

    def __init__(self, root: Path, trace: Trace, *, raw_bytes: int, interval_s: float) -> None:
        self.trace = trace
        self.raw_bytes = raw_bytes
        self.calls = TimedOs()
        self.clock = ManualClock(start_s=time.time())
        self.buffer = Buffer.allocate(raw_bytes)
        self.keys = chain(f"{root}", len(trace.parents))
        seam: Os = self.calls
        self.store = PrefixStore.open(
            str(root),
            namespace=FIELDS,
            config=StoreConfig(touch_interval_s=interval_s, direct_io="off"),
            index=None,
            background=False,
            os_calls=seam,
            clock=self.clock,
        )

    def run(self) -> None:
        """Serve every request at its time."""
        now_s = 0.0
        with closing(self.store):
            for request in self.trace.requests:
                self.clock.advance(request.at_s - now_s)
                now_s = request.at_s
                self.serve(self.trace.path(request.prompt), self.trace.path(request.end))

    def serve(self, prompt: list[int], path: list[int]) -> None:
        """Do what an engine does for one request."""
        keys = [self.keys[node] for node in path]
        found = self.store.longest_prefix(keys[: len(prompt)])
        for key in keys[:found]:
            loaded = self.store.load(key, self.buffer, raw_bytes=self.raw_bytes)
            assert isinstance(loaded, Loaded), loaded
        for at in range(found, len(keys)):
            chunk = Chunk(key=keys[at], parent=keys[at - 1] if at else None, end_token=256 * at + 1)
            assert self.store.store(chunk, self.buffer, raw_bytes=self.raw_bytes).published
        self.store.touch(keys)
        self.store.work()

    def cost(self) -> Cost:
        """Return what the touches cost."""
        counters = self.store.counters()
        spent_s = self.calls.spent_s
        return Cost(
            loaded=counters["loaded"],
            stored=counters["stored"],
            touches=self.calls.calls["touch"],
            touch_s=spent_s["touch"],
            other_s=sum(spent_s.values()) - spent_s["touch"],
        )


@contextmanager
def places(scratch: Path) -> Iterator[dict[str, Path]]:
    """Give a directory and, where it can be had, a mount of a GlusterFS volume."""
    found = {"a directory": scratch}
    with ExitStack() as stack:
        if is_installed():
            clear_dead_mounts()
            volume = stack.enter_context(closing(Volume()))
            volume.start()
            found["GlusterFS"] = volume.mount("a").path
        yield found


def replayed(directory: Path, trace: Trace, *, raw_bytes: int, interval_s: float) -> Cost:
    """Replay the trace on a root of its own."""
    with tempfile.TemporaryDirectory(dir=directory) as root:
        replay = Replay(Path(root, "root"), trace, raw_bytes=raw_bytes, interval_s=interval_s)
        replay.run()
    return replay.cost()


def cells(costs: list[Cost], *, requests: int) -> tuple[str, ...]:
    """Return the median of the rounds."""
    median = sorted(costs, key=lambda cost: cost.share)[len(costs) // 2]
    return (
        f"{median.loaded}",
        f"{median.stored}",
        f"{median.touches}",
        f"{1e6 * median.touch_s / max(1, median.touches):.0f}",
        f"{1e3 * median.other_s / requests:.1f}",
        f"{100 * median.share:.2f}",
        f"{100 * min(c.share for c in costs):.2f}-{100 * max(c.share for c in costs):.2f}",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sessions-an-hour", type=float, default=20, help="conversations that begin"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    add_report_options(parser)
    options = parser.parse_args()
    report = Report(about=__doc__ or "", machine=describe_machine(options.directory))
    rate = options.sessions_an_hour / 3600
    trace = make_trace("chat", seed=options.seed, duration_s=3600, rate=rate)
    rows = []
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as scratch,
        places(Path(scratch)) as found,
    ):
        for name, directory in found.items():
            for raw_bytes in CHUNK_BYTES:
                for interval_s in INTERVALS_S:
                    costs = [
                        replayed(directory, trace, raw_bytes=raw_bytes, interval_s=interval_s)
                        for _ in range(options.rounds)
                    ]
                    report.measurements += [
                        asdict(cost)
                        | {"where": name, "raw_bytes": raw_bytes, "interval_s": interval_s}
                        for cost in costs
                    ]
                    about = f"{name}, {raw_bytes / 1e6:.2g} MB, {interval_s:.0f} s"
                    rows.append((about, *cells(costs, requests=len(trace.requests))))
    columns = ("where, chunk, interval", "loaded", "stored", "touches", "us each")
    columns += ("other I/O ms a request", "touches, % of it", "lowest-highest")
    report.tables = [Table(title="touches on disk", columns=columns, rows=rows)]
    report.notes = [
        f"{len(trace.requests)} requests in an hour of the trace; medians of {options.rounds} rounds.",
        "Every hit is loaded from the store here, through the page cache.",
        "What an engine serves from its own memory is touched, too, at most once in the interval.",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
