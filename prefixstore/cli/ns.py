"""``prefixstore ns``: why engines share a namespace or do not."""

from typing import TYPE_CHECKING

import click
import msgspec

from prefixstore.cli.options import JSON, ROOT
from prefixstore.cli.render import echo_json, echo_table

if TYPE_CHECKING:
    from prefixstore.ops.namespaces import Difference

__all__ = ["command"]

VALUE_CHARS = 48
"""Of a value in a table; ``--json`` prints it whole."""
ID_DIGITS = 8


@click.group("ns")
def command() -> None:
    """Explain namespaces: what decides the bytes of a chunk besides its tokens."""


@command.command("ls", epilog="Example: prefixstore ns ls /mnt/kv")
@ROOT
@JSON
def list_namespaces(root: str, *, as_json: bool) -> int:
    """List the namespaces of ROOT with what tells them apart. Reads manifests only."""
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.namespaces import summarize
    from prefixstore.tree.root import Root

    found = summarize(Root.open(root))
    if as_json:
        echo_json(found)
    else:
        rows = [
            (
                each.namespace,
                each.model or "-",
                each.weights or "-",
                each.dtype or "-",
                each.kv_cache_dtype or "-",
                each.workers or "-",
                each.engine or "-",
            )
            for each in found
        ]
        headers = ("namespace", "model", "weights", "dtype", "cache", "workers", "engine")
        echo_table(headers, rows, right=frozenset({5}))
    for each in found:
        if each.error is not None:
            click.echo(f"Warning: {each.error}", err=True)
    return EXIT_FAILED if any(each.error is not None for each in found) else 0


@command.command("diff", epilog="Example: prefixstore ns diff /mnt/kv 3f9a 71c0")
@ROOT
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--all", "show_all", is_flag=True, help="Show the fields that agree as well.")
@JSON
def diff(root: str, one: str, other: str, *, show_all: bool, as_json: bool) -> int:
    """Show, field by field, how namespaces A and B of ROOT differ; beginnings of their ids suffice."""
    from prefixstore.ops.namespaces import compare, fields_of
    from prefixstore.ops.removal import find_namespace
    from prefixstore.tree.root import Root

    opened = Root.open(root)
    first, second = find_namespace(opened, one), find_namespace(opened, other)
    every = compare(fields_of(opened, first), fields_of(opened, second))
    shown = [each for each in every if show_all or not each.same]
    if as_json:
        echo_json({"one": first, "other": second, "fields": shown})
        return 0
    if shown:
        headers = ("field", f"{first[:ID_DIGITS]}", f"{second[:ID_DIGITS]}")
        echo_table(headers, [(each.field, *_values(each)) for each in shown])
    differing = sum(not each.same for each in every)
    if differing:
        click.echo(f"{differing} of {len(every)} fields differ: these engines share no chunks.")
    else:
        click.echo(f"All {len(every)} fields agree: engines with these fields share chunks.")
    return 0


def _values(difference: "Difference") -> tuple[str, str]:
    """Return both values as JSON, shortened where they do not differ."""
    one, other = (
        "(not there)" if difference.missing == side else msgspec.json.encode(value).decode()
        for side, value in (("one", difference.one), ("other", difference.other))
    )
    if max(len(one), len(other)) <= VALUE_CHARS:
        return one, other
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    return _around(one, start), _around(other, start)


def _around(text: str, place: int) -> str:
    """Cut a long text down to the surroundings of a place."""
    start = max(0, min(place - VALUE_CHARS // 2, len(text) - VALUE_CHARS))
    cut = text[start : start + VALUE_CHARS]
    return f"{'...' if start else ''}{cut}{'...' if start + VALUE_CHARS < len(text) else ''}"
