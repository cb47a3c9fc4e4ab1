"""``prefixstore gc``: evict down to a size, or by age."""

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, SIZE, YES, confirm, note, open_store
from prefixstore.cli.outcome import echo_done, echo_plan, exit_code
from prefixstore.cli.render import echo_json

__all__ = ["command"]


@click.command(
    "gc", epilog="Example: prefixstore gc /mnt/kv --max-bytes 500GiB --max-age 30d --dry-run"
)
@ROOT
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Keep no more than this (10GiB).")
@click.option("--max-age", type=AGE, metavar="AGE", help="Keep nothing unused for so long (7d).")
@click.option("--dry-run", is_flag=True, help="Tell what would go, remove nothing.")
@YES
@INDEX_DIR
@JSON
def command(
    root: str,
    *,
    max_bytes: float | None,
    max_age: float | None,
    dry_run: bool,
    yes: bool,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Evict chunks of ROOT: least recently used first, never one that a stored chunk or a pin needs.

    Engines may run meanwhile: what they are missing they compute.
    """
    if max_bytes is None and max_age is None:
        raise click.UsageError("Say how much may stay: --max-bytes, --max-age or both.")
    limit = None if max_bytes is None else int(max_bytes)
    with open_store(root, index_dir=index_dir, read_only=dry_run) as store:
        note(f"Scanning {root} ...")
        plan = store.evict(limit, max_age_s=max_age, dry_run=True)
        if dry_run or plan.errors or not plan.planned_chunks:
            echo_json(plan) if as_json else echo_plan(plan)
            return exit_code(plan)
        if not as_json or not yes:
            echo_plan(plan, err=as_json)
        confirm(f"Remove {plan.planned_chunks} chunks from {root}?", yes=yes)
        done = store.evict(limit, max_age_s=max_age, scan=False)
    echo_json(done) if as_json else echo_done(done)
    return exit_code(done)
