"""``prefixstore unpin``: let eviction have what a pin kept."""

import click

from prefixstore.cli.options import JSON, ROOT, open_store
from prefixstore.cli.render import echo_json

__all__ = ["command"]


@click.command("unpin", epilog="Example: prefixstore unpin /mnt/kv support-bot")
@ROOT
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@JSON
def command(root: str, *, names: tuple[str, ...], as_json: bool) -> int:
    """Remove pins from ROOT; their chunks stay until eviction takes them. Exits with 1 if one is not there.

    To remove the chunks as well: `prefixstore rm ROOT --pin NAME`.
    """
    from prefixstore.cli.main import EXIT_FAILED

    with open_store(root) as store:
        removed = {name: store.unpin(name) for name in names}
    if as_json:
        echo_json(removed)
    else:
        for name, was_there in removed.items():
            click.echo(
                f"Unpinned {name!r}." if was_there else f"No pin is called {name!r}.",
                err=not was_there,
            )
    return 0 if all(removed.values()) else EXIT_FAILED
