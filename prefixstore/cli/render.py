"""Tables and JSON on stdout. Only strings come in; what they say is the verbs' business.

On a terminal a table is drawn by rich; into a pipe it is plain aligned columns, so that scripts that
do not use ``--json`` and people with ``less`` get text without decoration, and rich is not imported.
"""

import sys
from collections.abc import Sequence

import click
import msgspec

__all__ = ["echo_json", "echo_table"]


def echo_json(document: object) -> None:
    """Print one JSON document; frozen dataclasses become objects."""
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def echo_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> None:
    """Print rows under headers.

    Args:
        headers: One for each column.
        rows: As many cells as there are headers.
        right: The columns that align to the right: numbers.
    """
    if sys.stdout.isatty():
        _echo_rich(headers, rows, right)
    else:
        click.echo(_plain(headers, rows, right), nl=False)


def _plain(headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> str:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for row in (headers, *rows):
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _echo_rich(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]
) -> None:
    import rich.box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
