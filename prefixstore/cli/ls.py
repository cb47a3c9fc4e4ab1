"""``prefixstore ls``: namespaces, or the chunks of one."""

import time
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT, note, open_store
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.units import format_age, format_size

if TYPE_CHECKING:
    from prefixstore.ops.report import ChunkLine, NamespaceLine

__all__ = ["command"]

FIELDS_CHARS = 60


@click.command("ls", epilog="Example: prefixstore ls /mnt/kv --namespace 3f9a --limit 20")
@ROOT
@click.option(
    "--namespace", metavar="ID", help="List this namespace's chunks; the id's beginning suffices."
)
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000_000),
    default=100,
    show_default=True,
    help="List no more than this; of chunks, those that eviction would look at first.",
)
@INDEX_DIR
@JSON
def command(
    root: str, *, namespace: str | None, limit: int, index_dir: str | None, as_json: bool
) -> int:
    """List the namespaces of ROOT, or the chunks of one, least recently used first."""
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.removal import find_namespace
    from prefixstore.ops.report import chunk_lines, namespace_lines

    with open_store(root, index_dir=index_dir, read_only=True) as store:
        chosen = find_namespace(store.root, namespace) if namespace is not None else None
        note(f"Scanning {root} ...")
        scan = store.reconcile()
        if chosen is not None:
            chunks = chunk_lines(store, chosen, limit=limit)
            total = sum(
                each.chunks for each in store.stats().namespaces if each.namespace == chosen
            )
            echo_json(chunks) if as_json else _echo_chunks(chunks, total)
        else:
            lines = namespace_lines(store)
            echo_json(lines[:limit]) if as_json else _echo_namespaces(lines, limit)
    for error in scan.errors:
        click.echo(f"Warning: not everything is listed: {error}", err=True)
    return EXIT_FAILED if scan.errors else 0


def _echo_namespaces(lines: "list[NamespaceLine]", limit: int) -> None:
    rows = [
        (
            line.namespace,
            f"{line.chunks}",
            format_size(line.file_bytes),
            _age(line.used_s),
            _brief(line.fields),
        )
        for line in lines[:limit]
    ]
    echo_table(
        ("namespace", "chunks", "size", "last used", "fields"), rows, right=frozenset({1, 2})
    )
    _echo_rest(len(rows), len(lines))


def _echo_chunks(chunks: "list[ChunkLine]", total: int) -> None:
    rows = [
        (
            chunk.key,
            f"{chunk.end_token}",
            format_size(chunk.file_bytes),
            _age(chunk.used_s),
            f"{chunk.children}",
            f"{chunk.pins}",
        )
        for chunk in chunks
    ]
    echo_table(
        ("key", "tokens", "size", "last used", "children", "pins"),
        rows,
        right=frozenset({1, 2, 4, 5}),
    )
    _echo_rest(len(rows), total)


def _echo_rest(shown: int, total: int) -> None:
    if shown < total:
        click.echo(f"... {total - shown} more: raise --limit")


def _age(used_s: int) -> str:
    return f"{format_age(time.time() - used_s)} ago" if used_s else "-"


def _brief(fields: dict[str, object]) -> str:
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    return text if len(text) <= FIELDS_CHARS else f"{text[: FIELDS_CHARS - 3]}..."
