"""``prefixstore export``: chunks into an archive."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT_OPTION, SIZE, note, open_store
from prefixstore.cli.progress import bytes_progress
from prefixstore.cli.prompt_keys import prompt_options
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.cli.prompt_keys import Asked

__all__ = ["command"]


@click.command(
    "export",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore export --root /mnt/kv --pin system-prompts kv.pfx",
)
@click.argument("out", metavar="OUT")
@ROOT_OPTION
@click.option("--namespace", metavar="ID", help="Only from this namespace; its beginning suffices.")
@click.option(
    "--pin", "pins", multiple=True, metavar="NAME", help="What this pin holds; repeatable."
)
@click.option(
    "--keys",
    type=click.File("r"),
    metavar="FILE",
    help="Chunks by their keys in hex, one a line; - for stdin. See `prefixstore ls`.",
)
@prompt_options(help="The stored chunks of these prompts.")
@click.option(
    "--split", type=SIZE, metavar="SIZE", help="Write OUT.001, OUT.002, ... of this size."
)
@INDEX_DIR
@JSON
def command(
    out: str,
    *,
    root: str,
    namespace: str | None,
    pins: tuple[str, ...],
    keys: TextIO | None,
    asked: "Asked | None",
    split: float | None,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Write chunks of a root into one archive, OUT, or to stdout if OUT is "-".

    With no choice everything is exported. What comes before a chosen chunk in its prompt comes along. The
    archive holds the prompts' content, as the root does.
    """
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.keys import key_from_hex
    from prefixstore.ops.export import export, select
    from prefixstore.ops.removal import find_namespace

    if keys is not None and asked is not None:
        raise click.UsageError("Give --keys or --prompts, not both.")
    wanted = None
    if keys is not None:
        wanted = [key_from_hex(line.split()[0]) for line in keys if line.strip()]
    if asked is not None:
        answer = asked.find(root, namespace=namespace)
        answer.refuse_errors()
        wanted = [key for each in answer.namespaces for key in answer.keys(each)]
    with open_store(root, index_dir=index_dir, read_only=True) as store:
        note(f"Scanning {root} ...")
        scan = store.reconcile()
        chosen = select(
            store,
            namespace=find_namespace(store.root, namespace) if namespace is not None else None,
            pins=pins,
            keys=wanted,
        )
        with (
            _opened(out, None if split is None else int(split)) as stream,
            bytes_progress("exporting", chosen.file_bytes) as progress,
        ):
            found = export(store, chosen, stream, progress=progress)
    said_to_stderr = out == "-"
    if as_json:
        if not said_to_stderr:
            echo_json(found)
    else:
        click.echo(
            f"{out}: {found.chunks} chunks, {format_size(found.file_bytes)}, of {found.namespaces} "
            "namespaces.",
            err=said_to_stderr,
        )
    # Of a prompt's keys, most namespaces hold none.
    unknown = () if asked is not None else found.unknown_keys
    for key in unknown:
        click.echo(f"Warning: no chunk {key} in {root}", err=True)
    for text in found.errors:
        click.echo(f"Warning: {text}", err=True)
    for text in scan.errors:
        click.echo(f"Error: not everything was looked at: {text}", err=True)
    failed = found.errors or scan.errors or unknown or not found.chunks
    return EXIT_FAILED if failed else 0


@contextmanager
def _opened(out: str, split_bytes: int | None) -> Iterator[BinaryIO]:
    if out == "-":
        if split_bytes is not None:
            raise click.UsageError("--split needs a file: OUT is stdout")
        if sys.stdout.isatty():
            raise click.UsageError("stdout is a terminal: redirect it, or name a file")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    from prefixstore.ops.volumes import VolumeWriter

    with VolumeWriter(Path(out), split_bytes=split_bytes) as stream:
        yield stream  # type: ignore[misc]  # a RawIOBase that writes all it is given
