"""Who uses a root, and who collects for it, as far as its files tell."""

from dataclasses import dataclass

from prefixstore.clock import SystemClock
from prefixstore.errors import PrefixStoreError
from prefixstore.tree.lease import Lease
from prefixstore.tree.root import Root
from prefixstore.tree.writers import Writers, this_process

__all__ = ["CollectorLine", "WriterLine", "collector_line", "writer_lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterLine:
    """A writer that has announced itself and not left.

    Attributes:
        writer: Its id.
        host: Where it runs; empty if its file cannot be read.
        pid: Its process there.
        seen_s: When it last said that it lives, by the file server's clock; hourly.
    """

    writer: str
    host: str
    pid: int
    seen_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorLine:
    """The collector of a root.

    Attributes:
        epoch: The newest epoch of its lease; 0 if nobody ever evicted.
        active: It has not ended: somebody evicts now, or died at it.
        holder: The id of the writer that holds it; empty if nobody does.
        host: Where that runs; empty if nobody knows.
        beat_s: When it last showed that it goes on, by the file server's clock; 0 if nobody holds it.
        scanned_s: When a whole scan of the root last ended, by that clock; 0 if none is known.
    """

    epoch: int
    active: bool
    holder: str
    host: str
    beat_s: float
    scanned_s: float


def writer_lines(root: Root) -> list[WriterLine]:
    """Return the writers of a root, the latest seen first.

    Raises:
        UnavailableError: They cannot be listed.
    """
    lines = [
        WriterLine(
            writer=writer,
            host=document.host if document is not None else "",
            pid=document.pid if document is not None else 0,
            seen_s=_modified_s(root, root.layout.writer(writer)),
        )
        for writer, document in Writers(root, this=this_process()).known().items()
    ]
    return sorted(lines, key=lambda line: -line.seen_s)


def collector_line(root: Root, writers: list[WriterLine]) -> CollectorLine:
    """Return what is known of the collector.

    Raises:
        UnavailableError: Its files cannot be read.
    """
    sight = Lease(root, holder="", clock=SystemClock()).sight()
    hosts = {line.writer: line.host for line in writers}
    holder = sight.holder if sight is not None else ""
    return CollectorLine(
        epoch=sight.epoch if sight is not None else 0,
        active=sight is not None and not sight.released,
        holder=holder,
        host=hosts.get(holder, ""),
        beat_s=sight.beat if sight is not None else 0.0,
        scanned_s=_modified_s(root, f"{root.layout.collector}/scan.json"),
    )


def _modified_s(root: Root, path: str) -> float:
    try:
        return root.os_calls.stat(path).modified_s
    except (PrefixStoreError, OSError):
        return 0.0
