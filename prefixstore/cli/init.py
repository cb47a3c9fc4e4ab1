"""``prefixstore init``: make a directory a root."""

import click

from prefixstore.cli.options import JSON, ROOT
from prefixstore.cli.render import echo_json

__all__ = ["command"]


@click.command("init", epilog="Example: prefixstore init /mnt/kv --group-shared")
@ROOT
@click.option(
    "--group-shared",
    is_flag=True,
    help="Let all users of the directory's group write (setgid directories).",
)
@JSON
def command(root: str, *, group_shared: bool, as_json: bool) -> None:
    """Make ROOT, a new or empty directory, a store. A store stays as it is."""
    from prefixstore.tree.root import Root

    made = Root.create(root, group_shared=group_shared)
    if as_json:
        echo_json({"root": made.path, "store_id": made.store_id})
    else:
        click.echo(f"{made.path} is a store (id {made.store_id}).")
