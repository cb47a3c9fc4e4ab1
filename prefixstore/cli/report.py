"""``prefixstore report``: one page about a root, for a browser."""

import time
from pathlib import Path

import click

from prefixstore.cli.options import AGE, INDEX_DIR, ROOT, SIZE, note, open_store

__all__ = ["command"]


@click.command("report", epilog="Example: prefixstore report /mnt/kv --out kv.html --since 30d")
@ROOT
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("prefixstore-report.html"),
    show_default=True,
    help="The file to write; replaced if it is there.",
)
@click.option("--since", type=AGE, default="7d", show_default=True, help="How much history.")
@click.option(
    "--max-bytes",
    type=SIZE,
    metavar="SIZE",
    help="Down to which usage the next eviction is planned. Default: a tenth less than now.",
)
@click.option(
    "--prefill-rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="TOKENS",
    help="Tokens a second that your engines compute, for the seconds that were saved.",
)
@INDEX_DIR
def command(
    root: str,
    *,
    out: Path,
    since: float,
    max_bytes: float | None,
    prefill_rate: float | None,
    index_dir: str | None,
) -> int:
    """Write a page about ROOT: what fills it, what it was worth, what goes next. Scans it."""
    from prefixstore.cli.main import EXIT_FAILED

    try:
        from prefixstore.ops.page import render
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"a report needs {error.name}: pip install 'prefixstore[report]'"
        ) from error
    from prefixstore.ops.insight import gather

    with open_store(root, index_dir=index_dir, read_only=True) as store:
        note(f"Scanning {root} ...")
        found = gather(
            store,
            since_s=int(time.time() - since),
            evict_to_bytes=None if max_bytes is None else int(max_bytes),
        )
    page = render(found, history_s=since, prefill_tokens_per_s=prefill_rate)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"cannot write {out}: {error.strerror}; name another --out FILE"
        ) from error
    click.echo(f"{out}: {found.root.chunks} chunks, {len(found.hours)} hours of history")
    for text in found.errors:
        click.echo(f"Warning: not everything is told: {text}", err=True)
    return EXIT_FAILED if found.errors else 0
