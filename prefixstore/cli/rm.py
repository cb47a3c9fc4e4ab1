"""``prefixstore rm``: remove chunks by namespace, prompt, pin, key or age."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, YES, confirm, note, open_store
from prefixstore.cli.outcome import echo_done, echo_plan, exit_code
from prefixstore.cli.prompt_keys import prompt_options
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.cli.prompt_keys import Asked
    from prefixstore.ops.removal import RemovalPlan
    from prefixstore.store import EvictionReport, PrefixStore
    from prefixstore.store.reconcile import ReconcileReport

__all__ = ["command"]

BEYOND = (
    "Archives, copies and snapshots of this root are beyond its reach, and engines that run may hold in "
    "memory what they served last."
)


@click.command(
    "rm",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore rm /mnt/kv --prompts erase.jsonl --model my-model --dry-run",
)
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
@prompt_options(
    help="Erase these prompts, and all that was computed from the whole of one. In --namespace, if given.",
)
@click.option("--pin", "pin_name", metavar="NAME", help="This pin and the chunks that it held.")
@click.option(
    "--shared",
    is_flag=True,
    help="With --prompts or --pin: also what other stored prompts share with them, and all after it.",
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
    asked: "Asked | None",
    pin_name: str | None,
    shared: bool,
    older_than: float | None,
    dry_run: bool,
    yes: bool,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Remove chunks from ROOT. What another pin needs stays: unpin it first.

    Engines may run meanwhile: what they are missing they compute and store again.
    """
    _refuse_mixtures(namespace, keys, asked, pin_name, older_than, shared=shared)
    if asked is not None and asked.prompts == "-" and not (yes or dry_run):
        raise click.UsageError("The prompts come from stdin, so nobody can be asked: give --yes.")
    with open_store(root, index_dir=index_dir, read_only=dry_run) as store:
        note(f"Scanning {root} ...")
        if older_than is not None:
            return _remove_old(store, older_than, dry_run=dry_run, yes=yes, as_json=as_json)
        scan = store.reconcile()
        if asked is not None:
            plan = _plan_prompts(store, namespace, asked, shared=shared)
        elif pin_name is not None:
            plan = _plan_pin(store, pin_name, shared=shared)
        else:
            plan = _plan_named(store, namespace, keys)
        return _remove(store, plan, scan, dry_run=dry_run, yes=yes, as_json=as_json)


def _refuse_mixtures(
    namespace: str | None,
    keys: tuple[str, ...],
    asked: "Asked | None",
    pin_name: str | None,
    older_than: float | None,
    *,
    shared: bool,
) -> None:
    kinds = [bool(keys), asked is not None, pin_name is not None, older_than is not None]
    if sum(kinds) > 1:
        raise click.UsageError("Give one of --key, --prompts, --pin and --older-than.")
    if not any(kinds) and namespace is None:
        raise click.UsageError(
            "Say what to remove: --namespace, --key, --prompts, --pin or --older-than."
        )
    if namespace is not None and older_than is not None:
        raise click.UsageError("--older-than goes over the whole root: give it alone.")
    if namespace is not None and pin_name is not None:
        raise click.UsageError("A pin knows its namespace: give --pin without --namespace.")
    if shared and asked is None and pin_name is None:
        raise click.UsageError("--shared goes with --prompts or --pin.")


def _remove_old(
    store: "PrefixStore", age_s: float, *, dry_run: bool, yes: bool, as_json: bool
) -> int:
    plan = store.evict(max_age_s=age_s, dry_run=True)
    if dry_run or not plan.planned_chunks:
        echo_json([plan]) if as_json else echo_plan(plan)
        return exit_code(plan)
    echo_plan(plan, err=as_json)
    confirm(f"Remove {plan.planned_chunks} chunks from {store.root.path}?", yes=yes)
    return _finish([store.evict(max_age_s=age_s, scan=False)], as_json=as_json)


def _plan_named(
    store: "PrefixStore", namespace: str | None, keys: tuple[str, ...]
) -> "RemovalPlan":
    from prefixstore.keys import key_from_hex
    from prefixstore.ops.removal import find_namespace, plan_removal

    named = [key_from_hex(text) for text in keys] if keys else None
    chosen = find_namespace(store.root, namespace) if namespace is not None else None
    return plan_removal(store, namespace=chosen, keys=named)


def _plan_prompts(
    store: "PrefixStore", namespace: str | None, asked: "Asked", *, shared: bool
) -> "RemovalPlan":
    from prefixstore.keys import NamespaceId
    from prefixstore.ops.removal import find_namespace
    from prefixstore.ops.removal_chains import chains_of_prompts, plan_chains

    chosen = find_namespace(store.root, namespace) if namespace is not None else None
    found = asked.find(store.root.path, namespace=chosen)
    found.refuse_errors()
    for name, reason in sorted(found.unkeyed.items()):
        click.echo(f"Warning: not looked for in namespace {name}: {reason}", err=True)
    chains = {NamespaceId(name): chains_of_prompts(found.chains(name)) for name in found.namespaces}
    return plan_chains(store, chains, shared=shared)


def _plan_pin(store: "PrefixStore", name: str, *, shared: bool) -> "RemovalPlan":
    from prefixstore.errors import InvalidError
    from prefixstore.ops.removal_chains import chains_of_keys, plan_chains

    pin = next((pin for pin in store.pins() if pin.name == name), None)
    if pin is None:
        raise InvalidError(
            f"no pin of {store.root.path} is called {name!r}: see `prefixstore pins`"
        )
    chains = {pin.namespace: chains_of_keys(store, pin.namespace, pin.keys)}
    return plan_chains(store, chains, shared=shared, released=[name])


def _remove(
    store: "PrefixStore",
    plan: "RemovalPlan",
    scan: "ReconcileReport",
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Show a plan, ask, carry it out, and say what was done."""
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.removal import carry_out

    _echo_named(plan, err=as_json)
    for key in plan.unknown_keys:
        click.echo(f"Warning: no such chunk: {key.hex()}", err=True)
    for error in scan.errors:
        click.echo(f"Error: not everything was looked at: {error}", err=True)
    failed = EXIT_FAILED if plan.unknown_keys or scan.errors else 0
    something = plan.chunks or plan.whole_namespace or plan.quarantined or plan.released_pins
    if dry_run or not something:
        if as_json:
            echo_json(
                {
                    "planned_chunks": len(plan.chunks),
                    "planned_bytes": plan.file_bytes,
                    "pinned_chunks": plan.pinned_chunks,
                    "shared_chunks": plan.shared_chunks,
                    "quarantined_files": len(plan.quarantined),
                }
            )
        return failed
    confirm(f"Remove {len(plan.chunks)} chunks from {store.root.path}?", yes=yes)
    failed = max(failed, _finish(carry_out(store, plan), as_json=as_json))
    for name in plan.released_pins:
        click.echo(f"Unpinned {name!r}.", err=as_json)
    click.echo(BEYOND, err=as_json)
    return failed


def _echo_named(plan: "RemovalPlan", *, err: bool) -> None:
    click.echo(f"To remove: {len(plan.chunks)} chunks, {format_size(plan.file_bytes)}.", err=err)
    if plan.quarantined:
        click.echo(f"           {len(plan.quarantined)} damaged ones in the quarantine.", err=err)
    if plan.pinned_chunks:
        click.echo(f"To keep:   {plan.pinned_chunks} chunks that pins need.", err=err)
    if plan.shared_chunks:
        click.echo(
            f"To keep:   {plan.shared_chunks} chunks that other stored prompts begin with (--shared).",
            err=err,
        )


def _finish(reports: "list[EvictionReport]", *, as_json: bool) -> int:
    if as_json:
        echo_json(reports)
    else:
        for report in reports:
            echo_done(report)
    return max(map(exit_code, reports), default=0)
