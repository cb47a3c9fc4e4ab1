"""``prefixstore bench``: how fast a root is."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import JSON, ROOT, SIZE, note
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.bench import BenchReport

__all__ = ["command"]


@click.command("bench", epilog="Example: prefixstore bench /mnt/kv --chunk 2.9MB --threads 8")
@ROOT
@click.option(
    "--chunk", type=SIZE, default="2MiB", show_default=True, metavar="SIZE", help="Payload of each."
)
@click.option(
    "--chunks", type=click.IntRange(1, 100_000), default=128, show_default=True, help="How many."
)
@click.option(
    "--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Calls in flight."
)
@click.option(
    "--durability",
    type=click.Choice(["none", "data", "full"]),
    default="none",
    show_default=True,
    help="What a power cut may take from the chunks that are stored.",
)
@JSON
def command(
    root: str, *, chunk: float, chunks: int, threads: int, durability: str, as_json: bool
) -> int:
    """Store, load and look up chunks in ROOT, through the store itself. Nothing stays there.

    Figures are of this moment: what else uses the disk, the network and this host is in them.
    """
    from prefixstore.config import Durability, StoreConfig
    from prefixstore.ops.bench import bench
    from prefixstore.tree.root import Root

    note(f"Storing {format_size(int(chunk) * chunks)} in {root} ...")
    found = bench(
        Root.open(root),
        chunk_bytes=int(chunk),
        chunks=chunks,
        threads=threads,
        config=StoreConfig(durability=Durability(durability)),
    )
    echo_json(found) if as_json else _echo(found)
    return 0


def _echo(found: "BenchReport") -> None:
    click.echo(
        f"{found.chunks} chunks of {format_size(found.chunk_bytes)}, {found.threads} threads\n"
    )
    rows = [
        (
            timing.operation,
            f"{timing.count}",
            f"{format_size(int(timing.bytes_per_s))}/s" if timing.bytes_per_s else "-",
            f"{timing.median_s * 1e3:.2f} ms",
            f"{timing.p99_s * 1e3:.2f} ms",
        )
        for timing in found.timings
    ]
    echo_table(
        ("operation", "count", "speed", "median", "p99"), rows, right=frozenset({1, 2, 3, 4})
    )
