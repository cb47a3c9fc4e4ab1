"""``prefixstore ls``: namespaces, chunks, or what of a prompt is stored."""

import time
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, SIZE, note, open_store
from prefixstore.cli.prompt_keys import prompt_options
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.units import format_age, format_size

if TYPE_CHECKING:
    from prefixstore.cli.prompt_keys import Asked
    from prefixstore.keys import NamespaceId
    from prefixstore.ops.listing import PromptHolding
    from prefixstore.ops.report import ChunkLine, NamespaceLine
    from prefixstore.store import PrefixStore

__all__ = ["command"]

FIELDS_CHARS = 60


@click.command(
    "ls",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore ls /mnt/kv --namespace 3f9a --older-than 7d --limit 20",
)
@ROOT
@click.option(
    "--namespace", metavar="ID", help="List this namespace's chunks; the id's beginning suffices."
)
@prompt_options(help="Tell which chunks of these prompts are stored.")
@click.option("--pin", "pin_name", metavar="NAME", help="Only chunks that this pin names.")
@click.option("--older-than", type=AGE, metavar="AGE", help="Only what was not used for so long.")
@click.option("--newer-than", type=AGE, metavar="AGE", help="Only what was used since.")
@click.option("--min-size", type=SIZE, metavar="SIZE", help="Only files of at least this size.")
@click.option("--max-size", type=SIZE, metavar="SIZE", help="Only files of at most this size.")
@click.option("--min-tokens", type=click.IntRange(0), help="Only chunks that end no earlier.")
@click.option("--max-tokens", type=click.IntRange(0), help="Only chunks that end no later.")
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
    root: str,
    *,
    namespace: str | None,
    asked: "Asked | None",
    pin_name: str | None,
    older_than: float | None,
    newer_than: float | None,
    min_size: float | None,
    max_size: float | None,
    min_tokens: int | None,
    max_tokens: int | None,
    limit: int,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """List the namespaces of ROOT, or chunks, least recently used first.

    Chunks are listed of one namespace, or of all with any of the filters. With --prompts FILE --model
    MODEL: for each prompt, how much of it is stored.
    """
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.listing import ChunkFilter
    from prefixstore.ops.removal import find_namespace

    now_s = time.time()
    wanted = ChunkFilter(
        used_before_s=None if older_than is None else now_s - older_than,
        used_since_s=None if newer_than is None else now_s - newer_than,
        file_bytes_min=min_size,
        file_bytes_max=max_size,
        end_token_min=min_tokens,
        end_token_max=max_tokens,
        pin=pin_name,
    )
    if asked is not None and wanted != ChunkFilter():
        raise click.UsageError("Filters go with a list of chunks, not with --prompts.")
    with open_store(root, index_dir=index_dir, read_only=True) as store:
        chosen = find_namespace(store.root, namespace) if namespace is not None else None
        note(f"Scanning {root} ...")
        scan = store.reconcile()
        if asked is not None:
            _list_prompts(store, asked, chosen, limit=limit, as_json=as_json)
        elif chosen is not None or wanted != ChunkFilter():
            _list_chunks(store, chosen, wanted, limit=limit, as_json=as_json)
        else:
            _list_namespaces(store, limit=limit, as_json=as_json)
    for error in scan.errors:
        click.echo(f"Warning: not everything is listed: {error}", err=True)
    return EXIT_FAILED if scan.errors else 0


def _list_namespaces(store: "PrefixStore", *, limit: int, as_json: bool) -> None:
    from prefixstore.ops.report import namespace_lines

    lines = namespace_lines(store)
    echo_json(lines[:limit]) if as_json else _echo_namespaces(lines, limit)


def _list_chunks(
    store: "PrefixStore",
    namespace: "NamespaceId | None",
    wanted: object,
    *,
    limit: int,
    as_json: bool,
) -> None:
    from prefixstore.ops.listing import ChunkFilter, list_chunks

    assert isinstance(wanted, ChunkFilter), "made above"
    chunks, total = list_chunks(store, namespace, wanted, limit=limit)
    echo_json(chunks) if as_json else _echo_chunks(chunks, total)


def _list_prompts(
    store: "PrefixStore",
    asked: "Asked",
    namespace: "NamespaceId | None",
    *,
    limit: int,
    as_json: bool,
) -> None:
    from prefixstore.keys import NamespaceId
    from prefixstore.ops.listing import holdings

    found = asked.find(store.root.path, namespace=namespace)
    lines = [(each.line, each.tokens, each.error) for each in found.prompts]
    held = holdings(
        store,
        {NamespaceId(name): found.chains(name) for name in found.namespaces},
        lines,
        everywhere=namespace is not None,
    )
    for name, reason in sorted(found.unkeyed.items()):
        click.echo(f"Warning: not looked for in namespace {name}: {reason}", err=True)
    echo_json(held[:limit]) if as_json else _echo_holdings(held, limit)


def _echo_holdings(held: "list[PromptHolding]", limit: int) -> None:
    rows = [
        (
            f"{each.line}",
            f"{each.tokens}",
            each.namespace or "-",
            f"{each.stored_chunks} of {each.chunks}" if each.namespace else "-",
            f"{each.prefix_tokens}" if each.namespace else "-",
            format_size(each.stored_bytes),
            each.error or "",
        )
        for each in held[:limit]
    ]
    echo_table(
        ("line", "tokens", "namespace", "stored", "prefix", "size", ""),
        rows,
        right=frozenset({0, 1, 3, 4, 5}),
    )
    _echo_rest(len(rows), len(held))


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
