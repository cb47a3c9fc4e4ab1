"""How a host finds what another one has stored: galloping probes, one stat a chunk, and journals.

One host publishes a prefix; another resolves it with an index that knows nothing (cold) and again with the
index that the first lookup has taught (warm). On GlusterFS the second host's client is started anew before
each cold lookup, so that neither it nor the kernel has any name in its cache. Then the first host publishes
chunks one by one, each after the other has looked for it in vain, and the time until the other sees it is
taken.

Ours is ``PrefixStore.longest_prefix`` with its index in LMDB. Journals are a prototype
(``discovery_journals.py``): each writer appends its keys to a file of its own, others read what is new at
every lookup.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.discovery_journals import JournalReader, JournalWriter
from benchmarks.report import Report, Table, add_report_options, describe_machine
from prefixstore.config import StoreConfig
from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.keys import Key, NamespaceId
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, chunk_at, payload_of
from prefixstore.testing.faults import FaultyOs
from prefixstore.tree.osfs import RealOs
from tests.sharedfs.gluster import Volume, clear_dead_mounts, is_installed

PAYLOAD_BYTES = 64
WAIT_MAX_S = 90.0


@dataclass
class Place:
    """A filesystem that two hosts have mounted.

    Attributes:
        name: What to call it.
        a: The root on the first host.
        b: The root on the second.
        remount: Starts the second host's client anew.
    """

    name: str
    a: Path
    b: Path
    remount: Callable[[], object] = lambda: None


@dataclass(slots=True)
class Figures:
    """What was measured of one way; milliseconds, calls on the filesystem, seconds."""

    cold_ms: list[float] = field(default_factory=list)
    cold_calls: list[int] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    warm_calls: list[int] = field(default_factory=list)
    seen_s: list[float] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """Return medians, and for what is seen the longest, too."""
        seen = f"{statistics.median(self.seen_s):.2f}" if self.seen_s else ""
        return (
            f"{statistics.median(self.cold_ms):.1f}",
            f"{statistics.median(self.cold_calls):.0f}",
            f"{statistics.median(self.warm_ms):.1f}" if self.warm_ms else "",
            f"{statistics.median(self.warm_calls):.0f}" if self.warm_calls else "",
            seen,
            f"{max(self.seen_s):.2f}" if self.seen_s else "",
        )


def timed(call: Callable[[], object], calls: FaultyOs) -> tuple[float, int]:
    """Return the milliseconds and the filesystem calls that ``call`` takes."""
    calls.reset()
    started_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started_s), len(calls.calls)


class Bench:
    """One place: a prefix that the first host has published, and ways to find it on the second."""

    def __init__(self, place: Place, options: argparse.Namespace, scratch: Path) -> None:
        self.place = place
        self.options = options
        self.scratch = scratch
        self.keys = chain(f"{place.name}", options.chunks)
        self.fresh = itertools.count()
        self.store = self.open(place.a, FaultyOs(RealOs()))
        assert self.store.namespace is not None
        self.namespace: NamespaceId = self.store.namespace
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda at: self.publish(self.keys, at), range(options.chunks)))
        self.journals = f"{place.a}/journals"
        Path(self.journals).mkdir()
        self.writers = [
            JournalWriter(RealOs(), self.journals, f"{number:032x}")
            for number in range(options.writers)
        ]

    def open(self, root: Path, calls: FaultyOs) -> PrefixStore:
        """Open the root as a host with an empty index of its own."""
        config = StoreConfig(index_dir=str(self.scratch / f"index-{next(self.fresh)}"))
        return PrefixStore.open(
            str(root), namespace=FIELDS, config=config, background=False, os_calls=calls
        )

    def publish(self, keys: list[Key], at: int) -> None:
        """Publish one chunk of a chain as the first host."""
        outcome = self.store.store(chunk_at(keys, at), payload_of(keys[at], PAYLOAD_BYTES))
        assert outcome.published, outcome

    def galloping(self) -> Figures:
        """Measure what the store does."""
        figures, calls = Figures(), FaultyOs(RealOs())
        for _ in range(self.options.rounds):
            self.place.remount()
            with self.open(self.place.b, calls) as other:
                self.cold(figures, lambda: other.longest_prefix(self.keys), calls)
                other.work()
                for _ in range(self.options.rounds):
                    # What was seen is believed for a second, which would make it free.
                    other._parts.present.clear()  # noqa: SLF001
                    self.warm(figures, lambda: other.longest_prefix(self.keys), calls)
        with self.open(self.place.b, calls) as other:
            keys = chain(f"{self.place.name}, seen", self.options.rounds)
            for at in range(len(keys)):
                assert other.longest_prefix(keys) == at
                self.publish(keys, at)
                wanted = at + 1
                figures.seen_s.append(wait_for(lambda: other.longest_prefix(keys) == wanted))  # noqa: B023
        return figures

    def one_by_one(self) -> Figures:
        """Measure one stat for each chunk, up to the first that is missing."""
        figures, calls = Figures(), FaultyOs(RealOs())
        for _ in range(min(3, self.options.rounds)):
            self.place.remount()
            with self.open(self.place.b, calls) as other:

                def look() -> int:
                    found = (other.tree.probe(self.namespace, key) for key in self.keys)
                    return sum(1 for _ in itertools.takewhile(lambda size: size is not None, found))

                self.cold(figures, look, calls)
        return figures

    def journal(self, *, writers: int, others: int) -> Figures:
        """Measure journals of some writers that hold the prefix and the keys of other chunks."""
        figures, calls = Figures(), FaultyOs(RealOs())
        active = self.writers[:writers]
        for number, writer in enumerate(active):
            writer.append(chain(f"others {number}", max(1, others // writers)))
        active[0].append(self.keys)
        directory = f"{self.place.b}/journals"
        for _ in range(self.options.rounds):
            self.place.remount()
            with self.index() as index:
                reader = JournalReader(calls, directory, index, self.namespace)

                def look() -> int:
                    reader.follow()  # noqa: B023
                    return index.known_prefix(self.namespace, self.keys)

                self.cold(figures, look, calls)
                for _ in range(self.options.rounds):
                    self.warm(figures, look, calls)
        with self.index() as index:
            reader = JournalReader(calls, directory, index, self.namespace)
            reader.follow()
            for at in range(self.options.rounds):
                keys = chain(f"{self.place.name}, journal {writers} {at}", 1)
                self.publish(keys, 0)
                active[0].append(keys)

                def sees() -> bool:
                    reader.follow()
                    return index.known_prefix(self.namespace, keys) == 1  # noqa: B023

                figures.seen_s.append(wait_for(sees))
        return figures

    @contextmanager
    def index(self) -> Iterator[LmdbIndex]:
        """Open an empty index."""
        directory = str(self.scratch / f"index-{next(self.fresh)}")
        with LmdbIndex.open(directory, store_id="journals") as index:
            yield index

    def cold(self, figures: Figures, look: Callable[[], int], calls: FaultyOs) -> None:
        """Take the first lookup."""
        found = []
        duration_ms, count = timed(lambda: found.append(look()), calls)
        assert found == [len(self.keys)], f"found {found} of {len(self.keys)}"
        figures.cold_ms.append(duration_ms)
        figures.cold_calls.append(count)

    def warm(self, figures: Figures, look: Callable[[], int], calls: FaultyOs) -> None:
        """Take a later lookup."""
        found = []
        duration_ms, count = timed(lambda: found.append(look()), calls)
        assert found == [len(self.keys)], f"found {found} of {len(self.keys)}"
        figures.warm_ms.append(duration_ms)
        figures.warm_calls.append(count)


def wait_for(condition: Callable[[], bool]) -> float:
    """Ask every 10 ms until ``condition`` holds; return how long that took."""
    started_s = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started_s < WAIT_MAX_S, f"not within {WAIT_MAX_S} s"
        time.sleep(0.01)
    return time.perf_counter() - started_s


def measure(place: Place, options: argparse.Namespace, scratch: Path) -> Table:
    """Measure every way at one place."""
    bench = Bench(place, options, scratch)
    with closing(bench.store):
        ways = {
            "ours: index, then galloping": bench.galloping(),
            "one stat a chunk": bench.one_by_one(),
            "journals, 1 writer, nothing else": bench.journal(writers=1, others=0),
            f"journals, {options.writers} writers, {options.others} other chunks": bench.journal(
                writers=options.writers, others=options.others
            ),
        }
    columns = ("way", "cold ms", "calls", "warm ms", "calls", "seen after s", "longest")
    rows = [(name, *figures.cells()) for name, figures in ways.items()]
    return Table(title=f"{place.name}: {options.chunks} chunks", columns=columns, rows=rows)


@contextmanager
def places(options: argparse.Namespace, scratch: Path) -> Iterator[list[Place]]:
    """Give a plain directory and, where it can be had, a GlusterFS volume with two mounts, twice."""
    root = scratch / "root"
    found = [Place("a directory", root, root)]
    with ExitStack() as stack:
        if is_installed():
            clear_dead_mounts()
            volume = stack.enter_context(closing(Volume()))
            volume.start()
            cached = [f"--{what}-timeout=30" for what in ("attribute", "entry", "negative")]
            for kind, arguments in (("GlusterFS", []), ("GlusterFS, caching for 30 s", cached)):
                if arguments and not options.cached:
                    continue
                names = [f"{'c' if arguments else ''}{host}" for host in "ab"]
                a, b = (volume.mount(name, arguments).path / f"root-{names[0]}" for name in names)
                found.append(Place(kind, a, b, lambda name=names[1]: volume.remount(name)))
        yield found


def main() -> None:
    """Print a table for each place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=4096, help="the length of the prefix")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--writers", type=int, default=16, help="journals in the larger case")
    parser.add_argument("--others", type=int, default=100_000, help="chunks of others in them")
    parser.add_argument("--cached", action="store_true", help="also on mounts that cache for 30 s")
    add_report_options(parser)
    options = parser.parse_args()
    report = Report(about=__doc__ or "", machine=describe_machine(options.directory))
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as scratch,
        places(options, Path(scratch)) as found,
    ):
        report.tables = [measure(place, options, Path(scratch)) for place in found]
    rounds = f"{options.rounds} rounds, {min(3, options.rounds)} for one stat a chunk"
    report.notes = [
        f"Medians of {rounds}; calls are those of the store, of which the kernel may make several.",
        "A journal's lookup lists the directory and looks at each file, every time.",
        "With journals each publication costs three calls more: open, write, close.",
        "GlusterFS: one brick in memory, two FUSE clients on this machine.",
    ]
    if len(found) == 1:
        report.notes.append("No GlusterFS here: tools/sharedfs-setup installs it (root only).")
    report.publish(options)


if __name__ == "__main__":
    main()
