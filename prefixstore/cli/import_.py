"""``prefixstore import``: an archive into a root."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT_OPTION, SIZE, open_store
from prefixstore.cli.progress import bytes_progress
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.keys import Fields
    from prefixstore.ops.importing import ImportReport
    from prefixstore.store import PrefixStore

__all__ = ["command"]


@click.command("import", epilog="Example: prefixstore import --root /mnt/kv kv.pfx --pin shipped")
@click.argument("archive", metavar="ARCHIVE")
@ROOT_OPTION
@click.option("--pin", metavar="NAME", help="Keep what is imported from eviction, by this name.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Stop when the root holds so much.")
@click.option(
    "--min-free", type=SIZE, default="0", metavar="SIZE", help="Stop when less room is left."
)
@click.option("--check", is_flag=True, help="Only prove the archive; import nothing.")
@INDEX_DIR
@JSON
def command(
    archive: str,
    *,
    root: str,
    pin: str | None,
    max_bytes: float | None,
    min_free: float,
    check: bool,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Publish the chunks of ARCHIVE in a root: a file, its first part, or "-" for stdin.

    A file is read twice: all of it is proved before anything is published. A stream is proved chunk by chunk.
    Run it again after a kill, or when there was no room: it goes on where it ended.
    """
    from prefixstore.ops.importing import import_archive, import_stream, inspect
    from prefixstore.ops.volumes import open_volumes, volumes_of

    def opened(fields: "Fields") -> "PrefixStore":
        return open_store(
            root,
            index_dir=index_dir,
            namespace=fields,
            max_bytes=None if max_bytes is None else int(max_bytes),
            min_free_bytes=int(min_free),
        )

    if archive == "-":
        with bytes_progress("importing", None) as progress:
            if check:
                inspect(sys.stdin.buffer, name="stdin", progress=progress)
                return 0
            found = import_stream(
                sys.stdin.buffer, opened, name="stdin", pin=pin, progress=progress
            )
    else:
        paths = volumes_of(Path(archive))
        passes = 1 if check else 2
        size = sum(path.stat().st_size for path in paths) * passes
        with bytes_progress("importing", size) as progress:
            if check:
                with open_volumes(paths) as source:
                    inspect(source, name=archive, progress=progress)
                click.echo(f"{archive} is whole, and every blob in it sound.", err=as_json)
                return 0
            found = import_archive(
                lambda: open_volumes(paths),
                opened,
                name=archive,
                pin=pin,
                progress=progress,
            )
    echo_json(found) if as_json else _echo(found, root)
    return 0


def _echo(found: "ImportReport", root: str) -> None:
    click.echo(
        f"{root}: {found.imported} chunks imported ({format_size(found.file_bytes)}), "
        f"{found.existed} were there before."
    )
