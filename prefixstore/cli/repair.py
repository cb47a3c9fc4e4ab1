"""``prefixstore repair``: rebuild this host's index, and mend what is broken in a root."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT, YES, confirm, note, open_store
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.repair import RepairReport

__all__ = ["command"]


@click.command("repair", epilog="Example: prefixstore repair /mnt/kv --dry-run")
@ROOT
@click.option("--dry-run", is_flag=True, help="Tell what would be done, change nothing.")
@YES
@INDEX_DIR
@JSON
def command(root: str, *, dry_run: bool, yes: bool, index_dir: str | None, as_json: bool) -> int:
    """Rebuild this host's index of ROOT from the tree, and clean up what crashes have left.

    Torn files go into the quarantine, temporary files of dead writers go, and chunks that no prompt can reach
    any more, since what comes before them is gone. Engines may run meanwhile.
    """
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.repair import RepairReport, carry_out, plan_repair

    note(f"Scanning {root} ...")
    if dry_run:
        from prefixstore.config import StoreConfig
        from prefixstore.store import PrefixStore

        config = StoreConfig(read_only=True)
        with PrefixStore.open(root, config=config, create=False, index=None) as store:
            found = RepairReport.planned(plan_repair(store))
    else:
        with open_store(root, index_dir=index_dir) as store:
            plan = plan_repair(store)
            if plan.lost_chunks or plan.torn:
                click.echo(
                    f"To drop: {plan.lost_chunks} chunks that follow nothing, "
                    f"{format_size(plan.lost_bytes)}. To quarantine: {len(plan.torn)} torn files.",
                    err=as_json,
                )
                confirm(f"Repair {root}?", yes=yes)
            found = carry_out(store, plan)
    echo_json(found) if as_json else _echo(found)
    for error in found.errors:
        click.echo(f"Error: {error}", err=True)
    return EXIT_FAILED if found.errors else 0


def _echo(found: "RepairReport") -> None:
    would = "Would have " if found.dry_run else ""
    lines = (
        (
            f"rebuilt this host's index: {found.indexed_chunks} chunks, "
            f"{format_size(found.indexed_bytes)}."
        ),
        f"moved {found.torn_files} torn files into the quarantine.",
        (
            f"dropped {found.dropped_chunks} chunks that followed nothing, "
            f"{format_size(found.dropped_bytes)}."
        ),
        f"reaped {found.orphan_files} files of {found.dead_writers} dead writers.",
    )
    for line in lines:
        click.echo(would + (line if would else line[0].upper() + line[1:]))
    if found.kept_chunks:
        click.echo(
            f"{found.kept_chunks} chunks without what comes before them stay: windows and states need "
            "nothing, young ones may get it, and pins keep theirs."
        )
