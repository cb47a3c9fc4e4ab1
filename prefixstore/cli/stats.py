"""``prefixstore stats``: what a root holds."""

import datetime as dt
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, note, open_store
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.signals import stopped_by_signals
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.hosts import CollectorLine
    from prefixstore.ops.report import RootReport

__all__ = ["command"]

WRITERS_SHOWN = 5


@click.command("stats", epilog="Example: prefixstore stats /mnt/kv --json | jq .file_bytes")
@ROOT
@INDEX_DIR
@click.option(
    "--serve",
    "port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Stay, and serve the figures to Prometheus on this port; 0 takes a free one.",
)
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    help="With --serve: the address to listen on; 0.0.0.0 for all of this host's.",
)
@click.option(
    "--interval",
    type=AGE,
    default="5m",
    show_default=True,
    help="With --serve: how long to wait between two looks at the root.",
)
@JSON
def command(
    root: str,
    *,
    index_dir: str | None,
    port: int | None,
    address: str,
    interval: float,
    as_json: bool,
) -> int:
    """Show what ROOT holds, by namespace. Scans it: a million chunks take about half a minute.

    With --serve it becomes a Prometheus exporter for the root.
    """
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.report import report

    if port is not None:
        _serve(root, index_dir=index_dir, port=port, address=address, interval_s=interval)
        return 0
    with open_store(root, index_dir=index_dir, read_only=True) as store:
        note(f"Scanning {root} ...")
        found = report(store)
    if as_json:
        echo_json(found)
    else:
        _echo(found)
    for error in found.errors:
        click.echo(f"Warning: not everything is counted: {error}", err=True)
    return EXIT_FAILED if found.errors else 0


def _serve(root: str, *, index_dir: str | None, port: int, address: str, interval_s: float) -> None:
    """Answer Prometheus until SIGINT or SIGTERM."""
    from prometheus_client import CollectorRegistry, start_http_server

    from prefixstore.ops.exporter import RootExporter

    with (
        stopped_by_signals() as stop,
        open_store(root, index_dir=index_dir, read_only=True) as store,
    ):
        exporter = RootExporter(store)
        registry = CollectorRegistry()
        registry.register(exporter)
        try:
            server, _ = start_http_server(port, address, registry)
        except OSError as error:
            raise click.ClickException(
                f"cannot listen on {address} port {port}: {error.strerror}; name another --serve PORT"
            ) from error
        click.echo(f"Serving http://{address}:{server.server_port}/metrics of {root}", err=True)
        try:
            exporter.run(interval_s=interval_s, stop=stop)
        finally:
            server.shutdown()
            server.server_close()


def _echo(found: "RootReport") -> None:
    saved = found.raw_bytes - found.file_bytes
    lines = [
        ("root", found.root),
        ("store id", found.store_id),
        ("chunks", f"{found.chunks}"),
        (
            "size",
            f"{format_size(found.file_bytes)} ({_share(found.file_bytes, found.total_bytes)})",
        ),
        ("compression", f"saves {format_size(saved)}" if saved > 0 else "saves nothing"),
        ("free space", f"{format_size(found.free_bytes)} of {format_size(found.total_bytes)}"),
        ("pins", ", ".join(f"{name} ({n})" for name, n in found.pins.items()) or "none"),
        ("ages", _ages(found)),
        ("limits", _limits(found)),
        ("collector", _collector(found.collector)),
        ("writers", _writers(found)),
        ("quarantine", _files(found.quarantine_files, found.quarantine_bytes)),
    ]
    if found.torn_files:
        lines.append(("torn files", f"{found.torn_files}: see `prefixstore verify {found.root}`"))
    for name, value in lines:
        click.echo(f"{name:12}{value}")
    if found.namespaces:
        click.echo()
        echo_table(
            ("namespace", "chunks", "size", "share", "last used", "oldest"),
            [
                (
                    line.namespace,
                    f"{line.chunks}",
                    format_size(line.file_bytes),
                    _share(line.file_bytes, found.file_bytes),
                    _moment(line.used_s),
                    _moment(line.oldest_s),
                )
                for line in found.namespaces
            ],
            right=frozenset({1, 2, 3}),
        )


def _ages(found: "RootReport") -> str:
    lines = [line for line in found.namespaces if line.chunks]
    if not lines:
        return "-"
    oldest, newest = min(line.oldest_s for line in lines), max(line.used_s for line in lines)
    return f"last used {_moment(oldest)} to {_moment(newest)}"


def _limits(found: "RootReport") -> str:
    from prefixstore.cli.limits import limit_lines

    if found.limits is None:
        return "none in the root"
    lines = limit_lines(found.limits)
    if found.limits.max_bytes is not None:
        lines.append(("used", _share(found.file_bytes, found.limits.max_bytes)))
    return ", ".join(f"{name} {value}" for name, value in lines)


def _collector(line: "CollectorLine") -> str:
    scanned = f"last scan {_moment(line.scanned_s)}" if line.scanned_s else "no scan known"
    if not line.epoch:
        return f"nobody has evicted yet, {scanned}"
    if not line.active:
        return f"at rest after eviction {line.epoch}, {scanned}"
    where = f" on {line.host}" if line.host else ""
    return f"{line.holder[:8]}{where} evicts, last seen {_moment(line.beat_s)}, {scanned}"


def _writers(found: "RootReport") -> str:
    shown = [
        f"{line.host or '?'} pid {line.pid} seen {_moment(line.seen_s)}"
        for line in found.seen[:WRITERS_SHOWN]
    ]
    more = len(found.seen) - len(shown)
    return (
        f"{found.writers}"
        + "".join(f"\n{'':12}{each}" for each in shown)
        + (f"\n{'':12}... {more} more: --json" if more else "")
    )


def _moment(used_s: float) -> str:
    return f"{dt.datetime.fromtimestamp(used_s, tz=dt.UTC):%Y-%m-%d %H:%M}Z" if used_s else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _files(files: int, size_bytes: int) -> str:
    return f"{files} files, {format_size(size_bytes)}" if files else "empty"
