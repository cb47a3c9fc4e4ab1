"""What I/O costs a scheduler's thread: a Python loop timed alone, and beside loads at full speed.

The loop imitates vLLM's scheduler: bursts of pure Python work with a short sleep between them, as it waits
for its device. In each turn it also asks its subject what has ended and begins as many loads anew, as a
scheduler asks its tiers; that is part of the turn. Loads run (a) in threads of the loop's process that
verify each chunk, (b) in our I/O process, with only messages and the copy into the slots left in the
loop's, and (c) in the threads of vLLM's own fs tier, which verifies nothing.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import Report, Table, add_report_options, describe_machine
from benchmarks.subjects import FsTier, IoProcess, Slots, Subject, Threads, drive
from prefixstore.keys import Key
from prefixstore.vllm.options import TierOptions

WORK_ADDITIONS = 8000
"""Additions in one turn: half a millisecond or so, the bookkeeping of some twenty requests."""
SLEEP_S = 0.0005
WARM_S = 0.2
ALONE = "nothing"
SWITCH_S = sys.getswitchinterval()


@dataclass(slots=True)
class Beside:
    """What a loop met beside one subject, round by round."""

    turns_s: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Loads:
    """Loads of a subject, kept in flight from the loop's own thread."""

    def __init__(self, subject: Subject, keys: list[Key]) -> None:
        self._subject = subject
        self._keys = itertools.cycle(keys)
        self._tickets = itertools.count()
        self._flying: dict[int, int] = {}
        self.loaded = 0

    def begin(self) -> None:
        """Fill all slots."""
        for slot in range(self._subject.slots.count):
            self._load(slot)

    def step(self) -> None:
        """Begin a load for each that has ended."""
        for ticket in self._subject.poll():
            self.loaded += 1
            self._load(self._flying.pop(ticket))

    def end(self) -> None:
        """Wait for what is in flight."""
        while self._flying:
            for ticket in self._subject.poll():
                del self._flying[ticket]
            time.sleep(SLEEP_S)

    def _load(self, slot: int) -> None:
        ticket = next(self._tickets)
        self._flying[ticket] = slot
        self._subject.load(ticket, [(next(self._keys), slot)])


def work() -> int:
    """Do one turn's worth of pure Python work."""
    total = 0
    for i in range(WORK_ADDITIONS):
        total += i & 7
    return total


def time_turns(seconds: float, step: Callable[[], None]) -> list[float]:
    """Run the loop for ``seconds``; return the length of each turn, without its sleep."""
    turns_s = []
    end_s = time.perf_counter() + seconds
    while (started_s := time.perf_counter()) < end_s:
        step()
        work()
        turns_s.append(time.perf_counter() - started_s)
        time.sleep(SLEEP_S)
    return turns_s


def measure(subject: Subject, keys: list[Key], beside: Beside, *, seconds: float) -> None:
    """Time the loop beside one subject for one round."""
    loads = Loads(subject, keys)
    loads.begin()
    time_turns(WARM_S, loads.step)
    before, started_s = loads.loaded, time.perf_counter()
    beside.turns_s.append(time_turns(seconds, loads.step))
    elapsed_s = time.perf_counter() - started_s
    beside.rates.append((loads.loaded - before) * subject.slots.slot_bytes / elapsed_s)
    loads.end()


def percentile(turns_s: list[float], percent: int) -> float:
    """Return a quantile."""
    return statistics.quantiles(turns_s, n=100)[percent - 1]


def tabulate(measured: dict[str, Beside]) -> Table:
    """Compare medians over rounds with the loop alone."""
    alone = measured[ALONE]
    rows = []
    for name, beside in measured.items():
        p99_s = [percentile(turns_s, 99) for turns_s in beside.turns_s]
        ratios = sorted(
            p99 / percentile(base, 99) for p99, base in zip(p99_s, alone.turns_s, strict=True)
        )
        rows.append(
            (
                name,
                f"{1e3 * statistics.median(map(statistics.median, beside.turns_s)):.2f}",
                f"{1e3 * statistics.median(p99_s):.2f}",
                f"{1e3 * statistics.median(map(max, beside.turns_s)):.1f}",
                f"{statistics.median(ratios):.1f}",
                f"{ratios[0]:.1f}-{ratios[-1]:.1f}",
                f"{statistics.median(beside.rates) / 1e6:.0f}" if beside.rates else "",
            )
        )
    columns = ("beside", "p50 ms", "p99 ms", "max ms", "p99 ratio", "lowest-highest", "load MB/s")
    return Table(title="one turn of the loop", columns=columns, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_report_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each loop (3)")
    parser.add_argument("--depth", type=int, default=8, help="chunks in flight (8)")
    parser.add_argument("--chunk-bytes", type=int, default=2_949_120)
    parser.add_argument("--chunks", type=int, default=64, help="how many are loaded in turn (64)")
    return parser.parse_args()


def main() -> None:
    """Run all rounds and print the table."""
    options = parse()
    directory = Path(tempfile.mkdtemp(prefix="bench-scheduler-", dir=options.directory))
    slots = Slots(count=options.depth, slot_bytes=options.chunk_bytes)
    keys = [Key(os.urandom(36)) for _ in range(options.chunks)]
    tier_options = TierOptions.from_mapping({"root": "unused"})
    notes = []
    try:
        report = Report(about=str(__doc__).strip(), machine=describe_machine(directory))
        with contextlib.ExitStack() as stack:

            def new(name: str) -> Path:
                (directory / name).mkdir()
                return directory / name

            threads = tier_options.load_threads
            subjects: dict[str, Subject] = {
                f"ours, {threads} threads": Threads(
                    slots, new("threads"), tier_options, threads=threads
                ),
                "ours, I/O process": IoProcess(slots, new("process"), tier_options),
            }
            try:
                subjects["vLLM's fs tier"] = FsTier(slots, new("fs"))
            except ImportError as error:
                notes.append(f"vLLM's fs tier was left out, since vLLM is not installed: {error}.")
            for subject in subjects.values():
                stack.callback(subject.close)
                drive(subject, keys, depth=options.depth, store=True)
            measured = {name: Beside() for name in (ALONE, *subjects)}
            for _ in range(options.rounds):
                measured[ALONE].turns_s.append(time_turns(options.seconds, lambda: None))
                for name, subject in subjects.items():
                    measure(subject, keys, measured[name], seconds=options.seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.tables = [tabulate(measured)]
    taken = (
        f"{options.depth} chunks of {options.chunk_bytes} bytes in flight; medians over {options.rounds} "
        f"rounds of {options.seconds:g} s for each row."
    )
    report.notes = [
        taken,
        f"Python hands the interpreter lock over every {1e3 * SWITCH_S:.0f} ms at the latest.",
        *notes,
    ]
    for name, beside in measured.items():
        report.measurements.append(
            {"beside": name, "turns_s": beside.turns_s, "load_bytes_a_second": beside.rates}
        )
    report.publish(options)


if __name__ == "__main__":
    main()
