"""Loads and stores of whole chunks: ours beside vLLM's own fs tier and fio, in one run.

Each round stores new chunks with every subject, then loads them twice: first cold, with the files put
out of this machine's page cache, then warm. Subjects take turns in another order each round, and each is
compared with the fs tier of the same round, so that a disk that changes its speed meanwhile changes all.
Roots, processes and memory are new in each round: how scattered memory happens to be decides much of the
speed past the page cache, and is another matter of luck each time.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.fio import Fio
from benchmarks.report import Report, Table, add_report_options, describe_machine
from benchmarks.subjects import FsTier, IoProcess, Slots, Subject, Threads, drive
from prefixstore.keys import Key
from prefixstore.vllm.options import TierOptions

SIZES = (368_640, 2_949_120, 16_777_216)
"""16 tokens of SmolLM2-135M; 128 of them, a block of vLLM's CPU platform; a block of a large model."""
BASE = "vLLM's fs tier"
WARM_DEPTHS = 2
"""How often each subject fills its slots, untimed, before a round: an engine runs for hours, and what its
first chunks cost is paid once."""
PHASES = ("store", "load cold", "load warm")
TARGETS = {"store": 0.75, "load cold": 0.8, "load warm": 0.8}
OURS = "ours, I/O process"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One subject in one phase of one round."""

    chunk_bytes: int
    round: int
    phase: str
    subject: str
    chunks: int
    elapsed_s: float


Move = Callable[[str], float]
"""Moves a round's chunks in a phase and returns the seconds it took."""


def chunks_of(chunk_bytes: int, options: argparse.Namespace) -> int:
    """Return how many chunks of a size make up the megabytes wanted; all in flight twice at least."""
    wanted = int(options.megabytes * 1e6) // chunk_bytes
    return int(max(wanted // options.depth, 2) * options.depth)


class Round:
    """All subjects at one chunk size, for one round.

    Attributes:
        notes: What a reader of the figures should know of the subjects.
    """

    def __init__(
        self, directory: Path, *, number: int, chunk_bytes: int, options: argparse.Namespace
    ) -> None:
        self.notes: list[str] = []
        self._number = number
        self._chunk_bytes = chunk_bytes
        self._directory = directory
        self._options = options
        self._chunks = chunks_of(chunk_bytes, options)
        self._slots = Slots(count=options.depth, slot_bytes=chunk_bytes)
        self._stack = contextlib.ExitStack()
        self._moves: dict[str, Move] = {}

    def __enter__(self) -> Self:
        with self._stack:
            self._open()
            self._stack = self._stack.pop_all()
        return self

    def _open(self) -> None:
        tier_options = TierOptions.from_mapping({"root": "unused", **dict(self._options.option)})
        only = self._options.only
        if not only or "process" in only:
            self._add(OURS, IoProcess(self._slots, self._new("process"), tier_options))
        if not only or "threads" in only:
            name = f"ours, {self._options.depth} threads"
            threads = Threads(
                self._slots, self._new("threads"), tier_options, threads=self._options.depth
            )
            self._add(name, threads)
        try:
            tier = FsTier(self._slots, self._new("fs"))
        except ImportError as error:
            self.notes.append(f"vLLM's fs tier was left out, since vLLM is not installed: {error}.")
        else:
            self.notes.append(f"At {_size(self._chunk_bytes)} {tier.about}.")
            self._add(BASE, tier)
        if (only and "fio" not in only) or self._options.job > 1:
            return
        if Fio.is_here():
            fio = Fio(self._new("fio"), chunk_bytes=self._chunk_bytes, depth=self._options.depth)
            self._moves["fio"] = lambda phase: fio.run(chunks=self._chunks, store=phase == "store")
        else:
            self.notes.append("fio was left out: it is not installed (Debian: apt install fio).")

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _new(self, name: str) -> Path:
        directory = self._directory / name
        directory.mkdir()
        return directory

    def _add(self, name: str, subject: Subject) -> None:
        self._stack.callback(subject.close)
        first = [Key(os.urandom(36)) for _ in range(WARM_DEPTHS * self._options.depth)]
        drive(subject, first, depth=self._options.depth, store=True)
        drive(subject, first, depth=self._options.depth, store=False)
        keys = [Key(os.urandom(36)) for _ in range(self._chunks)]
        self._moves[name] = lambda phase: drive(
            subject,
            keys,
            depth=self._options.depth,
            store=phase == "store",
            job_chunks=self._options.job,
        )

    def run(self) -> list[Measurement]:
        """Let every subject store, load cold and load warm once."""
        measurements = []
        names = list(self._moves)
        for at, phase in enumerate(PHASES, start=self._number):
            if phase == "load cold":
                self._put_out_of_cache()
            for name in names[at % len(names) :] + names[: at % len(names)]:
                elapsed_s = self._moves[name](phase)
                measurements.append(
                    Measurement(
                        self._chunk_bytes, self._number, phase, name, self._chunks, elapsed_s
                    )
                )
                # What a subject leaves to the journal or the page cache must not slow the next one.
                self._settle()
        return measurements

    def _settle(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        time.sleep(self._options.pause)

    def _put_out_of_cache(self) -> None:
        if self._options.drop_caches:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return
        for path in self._directory.rglob("*"):
            if path.is_file() and "index" not in path.parts:
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)


def _size(chunk_bytes: int) -> str:
    return f"{chunk_bytes / 1e6:#.2g} MB".replace(". ", " ")


def tabulate(measurements: list[Measurement], phase: str) -> Table:
    """Compare the subjects in one phase: medians over rounds, ratios of the same round."""
    taken = [m for m in measurements if m.phase == phase]
    by = {(m.chunk_bytes, m.subject, m.round): m for m in taken}
    names = list(dict.fromkeys(m.subject for m in taken))
    sizes = sorted({m.chunk_bytes for m in taken})
    rounds = sorted({m.round for m in taken})
    rows = []
    for size in sizes:
        for name in sorted(names):
            rates = [
                m.chunks * size / m.elapsed_s / 1e6 for m in (by[size, name, r] for r in rounds)
            ]
            ratio = spread = "-"
            if (size, BASE, rounds[0]) in by:
                ratios = sorted(
                    by[size, BASE, r].elapsed_s / by[size, name, r].elapsed_s for r in rounds
                )
                ratio = f"{statistics.median(ratios):.2f}"
                spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            target = f"{TARGETS[phase]:.2f}" if name == OURS else ""
            rows.append(
                (_size(size), name, f"{statistics.median(rates):.0f}", ratio, spread, target)
            )
    columns = ("chunk", "subject", "MB/s", "of fs tier", "lowest-highest", "wanted")
    return Table(title=phase, columns=columns, rows=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_report_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--depth", type=int, default=8, help="chunks in flight (8)")
    parser.add_argument(
        "--job", type=int, default=1, help="chunks in one job, as the blocks of one prompt are (1)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=256, help="of each subject, size and round (256)"
    )
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two timings")
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="before cold loads, empty the whole machine's caches (root) instead of our files' pages",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("process", "threads", "fio"),
        help="beside the fs tier; all of them by default",
    )
    parser.add_argument(
        "--option",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        type=_option,
        help="an option of ours, such as direct_io off",
    )
    options = parser.parse_args()
    if options.depth % options.job:
        parser.error("--depth must be a multiple of --job")
    return options


def _option(text: str) -> object:
    return int(text) if text.isdecimal() else text


def main() -> None:
    """Run all rounds and print a table for each phase."""
    options = parse()
    directory = Path(tempfile.mkdtemp(prefix="bench-io-", dir=options.directory))
    try:
        report = Report(about=__doc__.strip(), machine=describe_machine(directory))
        measurements: list[Measurement] = []
        notes: list[str] = []
        for number, size in itertools.product(range(options.rounds), options.sizes):
            place = directory / f"{number}-{size}"
            place.mkdir()
            with Round(place, number=number, chunk_bytes=size, options=options) as round_:
                measurements += round_.run()
            notes += round_.notes
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.tables = [tabulate(measurements, phase) for phase in PHASES]
    cold = "all caches emptied" if options.drop_caches else "files put out of the page cache"
    report.notes = [
        f"{options.depth} chunks in flight in jobs of {options.job}, {options.rounds} rounds, "
        + ", ".join(f"{chunks_of(size, options)} chunks of {_size(size)}" for size in options.sizes)
        + " in each.",
        f"Cold: {cold} of this machine; a hypervisor's or a disk's own cache stays as it is.",
        "Ours verifies every load and copies between slots and buffers; the fs tier does neither.",
        *dict.fromkeys(notes),
    ]
    for m in measurements:
        report.measurements.append({name: getattr(m, name) for name in Measurement.__slots__})
    report.publish(options)


if __name__ == "__main__":
    main()
