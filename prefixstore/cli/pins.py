"""``prefixstore pins``: what pins keep."""

import datetime as dt

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT, note, open_store
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.units import format_size

__all__ = ["command"]


@click.command("pins", epilog="Example: prefixstore pins /mnt/kv --json")
@ROOT
@INDEX_DIR
@JSON
def command(root: str, *, index_dir: str | None, as_json: bool) -> None:
    """List the pins of ROOT: what each names, how much of it is stored, when it ends."""
    from prefixstore.ops.pins import pin_lines

    with open_store(root, index_dir=index_dir, read_only=True) as store:
        note(f"Scanning {root} ...")
        store.reconcile()
        lines = pin_lines(store, now_s=store.server_now_s())
    if as_json:
        echo_json(lines)
        return
    echo_table(
        ("pin", "namespace", "keys", "stored", "size", "ends"),
        [
            (
                line.name,
                line.namespace,
                f"{line.keys}",
                f"{line.stored_chunks}",
                format_size(line.stored_bytes),
                _end(line.ends_at_s, holds=line.holds),
            )
            for line in lines
        ],
        right=frozenset({2, 3, 4}),
    )


def _end(ends_at_s: int | None, *, holds: bool) -> str:
    if ends_at_s is None:
        return "never"
    moment = dt.datetime.fromtimestamp(ends_at_s, tz=dt.UTC)
    return f"{moment:%Y-%m-%d %H:%M}Z" if holds else "has ended"
