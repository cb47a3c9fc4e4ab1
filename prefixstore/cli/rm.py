"""``prefixstore rm``: remove a namespace, single chunks, or old ones."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, YES, confirm, note, open_store
from prefixstore.cli.outcome import echo_done, echo_plan, exit_code
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.store import EvictionReport, PrefixStore

__all__ = ["command"]


@click.command("rm", epilog="Example: prefixstore rm /mnt/kv --namespace 3f9a --yes")
@ROOT
@click.option(
    "--namespace", metavar="ID", help="All of this namespace; the id's beginning suffices."
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="HEX",
    help="This chunk and all that follow it, as `ls` prints it; repeatable. In --namespace, if given.",
)
@click.option("--older-than", type=AGE, metavar="AGE", help="What was not used for so long (7d).")
@click.option("--dry-run", is_flag=True, help="Tell what would go, remove nothing.")
@YES
@INDEX_DIR
@JSON
def command(
    root: str,
    *,
    namespace: str | None,
    keys: tuple[str, ...],
    older_than: float | None,
    dry_run: bool,
    yes: bool,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Remove chunks from ROOT. What a pin needs stays: unpin it first.

    Engines may run meanwhile: what they are missing they compute and store again.
    """
    if older_than is None and namespace is None and not keys:
        raise click.UsageError("Say what to remove: --namespace, --key or --older-than.")
    if older_than is not None and (namespace is not None or keys):
        raise click.UsageError("--older-than goes over the whole root: give it alone.")
    with open_store(root, index_dir=index_dir, read_only=dry_run) as store:
        note(f"Scanning {root} ...")
        if older_than is not None:
            return _remove_old(store, older_than, dry_run=dry_run, yes=yes, as_json=as_json)
        return _remove_named(store, namespace, keys, dry_run=dry_run, yes=yes, as_json=as_json)


def _remove_old(
    store: "PrefixStore", age_s: float, *, dry_run: bool, yes: bool, as_json: bool
) -> int:
    plan = store.evict(max_age_s=age_s, dry_run=True)
    if dry_run or plan.errors or not plan.planned_chunks:
        echo_json([plan]) if as_json else echo_plan(plan)
        return exit_code(plan)
    echo_plan(plan, err=as_json)
    confirm(f"Remove {plan.planned_chunks} chunks from {store.root.path}?", yes=yes)
    return _finish([store.evict(max_age_s=age_s, scan=False)], as_json=as_json)


def _remove_named(
    store: "PrefixStore",
    namespace: str | None,
    keys: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.keys import key_from_hex
    from prefixstore.ops.removal import carry_out, find_namespace, plan_removal

    named = [key_from_hex(text) for text in keys] if keys else None
    chosen = find_namespace(store.root, namespace) if namespace is not None else None
    scan = store.reconcile()
    plan = plan_removal(store, namespace=chosen, keys=named)
    click.echo(
        f"To remove: {len(plan.chunks)} chunks, {format_size(plan.file_bytes)}.", err=as_json
    )
    if plan.pinned_chunks:
        click.echo(f"To keep:   {plan.pinned_chunks} chunks that pins need.", err=as_json)
    for key in plan.unknown_keys:
        click.echo(f"Warning: no such chunk: {key.hex()}", err=True)
    for error in scan.errors:
        click.echo(f"Error: not everything was looked at: {error}", err=True)
    failed = EXIT_FAILED if plan.unknown_keys or scan.errors else 0
    if dry_run or not (plan.chunks or plan.whole_namespace):
        if as_json:
            echo_json({"planned_chunks": len(plan.chunks), "planned_bytes": plan.file_bytes})
        return failed
    confirm(f"Remove {len(plan.chunks)} chunks from {store.root.path}?", yes=yes)
    return max(failed, _finish(carry_out(store, plan), as_json=as_json))


def _finish(reports: "list[EvictionReport]", *, as_json: bool) -> int:
    if as_json:
        echo_json(reports)
    else:
        for report in reports:
            echo_done(report)
    return max(map(exit_code, reports), default=0)
