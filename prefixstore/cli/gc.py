"""``prefixstore gc``: evict by the root's limits, down to a size, or by age; once, or again and again."""

import datetime as dt
import json
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, ROOT, SIZE, YES, confirm, note, open_store
from prefixstore.cli.outcome import echo_done, echo_plan, exit_code, why
from prefixstore.cli.render import echo_json
from prefixstore.cli.signals import stopped_by_signals
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.watch import Pass

__all__ = ["command"]


@click.command(
    "gc", epilog="Example: prefixstore gc /mnt/kv --max-bytes 500GiB --max-age 30d --dry-run"
)
@ROOT
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Keep no more than this (10GiB).")
@click.option("--max-age", type=AGE, metavar="AGE", help="Keep nothing unused for so long (7d).")
@click.option("--dry-run", is_flag=True, help="Tell what would go and why, remove nothing.")
@click.option("--watch", is_flag=True, help="Stay, and collect again and again; asks nothing.")
@click.option(
    "--interval",
    type=AGE,
    default="1m",
    show_default=True,
    help="With --watch: how long to wait between two passes.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="With --watch: of the time of a pass, how much to work; the rest is rest for the disk.",
)
@YES
@INDEX_DIR
@JSON
def command(
    root: str,
    *,
    max_bytes: float | None,
    max_age: float | None,
    dry_run: bool,
    watch: bool,
    interval: float,
    share: float,
    yes: bool,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Evict chunks of ROOT: least recently used first, never one that a stored chunk or a pin needs.

    Without a size or an age the limits of the root decide (`prefixstore limits`). Engines may run
    meanwhile: what they are missing they compute. With --watch it is the root's collector, alone or beside
    those of the engines, until SIGTERM or SIGINT; a line tells of each pass.
    """
    limit = None if max_bytes is None else int(max_bytes)
    if watch:
        if dry_run:
            raise click.UsageError("--watch removes: leave out --dry-run.")
        return _watch(
            root,
            index_dir=index_dir,
            interval_s=interval,
            share=share,
            max_bytes=limit,
            max_age_s=max_age,
            as_json=as_json,
        )
    with open_store(root, index_dir=index_dir, read_only=dry_run) as store:
        if limit is None and max_age is None and not store.limits().any:
            raise click.UsageError(
                "Say how much may stay: --max-bytes, --max-age or both; or give the root limits with "
                "`prefixstore limits`."
            )
        note(f"Scanning {root} ...")
        plan = store.evict(limit, max_age_s=max_age, dry_run=True)
        if dry_run or not plan.planned_chunks:
            echo_json(plan) if as_json else echo_plan(plan)
            return exit_code(plan)
        if not as_json or not yes:
            echo_plan(plan, err=as_json)
        confirm(f"Remove {plan.planned_chunks} chunks from {root}?", yes=yes)
        done = store.evict(limit, max_age_s=max_age, scan=False)
    echo_json(done) if as_json else echo_done(done)
    return exit_code(done)


def _watch(
    root: str,
    *,
    index_dir: str | None,
    interval_s: float,
    share: float,
    max_bytes: int | None,
    max_age_s: float | None,
    as_json: bool,
) -> int:
    """Collect until SIGINT or SIGTERM; a second one ends at once, in the middle of whatever hangs."""
    from prefixstore.clock import SystemClock
    from prefixstore.ops.watch import watch

    with stopped_by_signals() as stop:
        passes = watch(
            lambda: open_store(root, index_dir=index_dir),
            interval_s=interval_s,
            share=share,
            max_bytes=max_bytes,
            max_age_s=max_age_s,
            stop=stop,
            clock=SystemClock(),
        )
        for each in passes:
            click.echo(_json_line(each) if as_json else _line(each))
    return 0


def _json_line(found: "Pass") -> str:
    import msgspec

    return json.dumps(msgspec.to_builtins(found))


def _line(found: "Pass") -> str:
    moment = f"{dt.datetime.fromtimestamp(found.ended_s, tz=dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
    report = found.report
    if found.state == "failed":
        return f"{moment} failed: {found.error}"
    if report is None:
        return f"{moment} left to another host, which evicts right now"
    went = f"{report.evicted_chunks} chunks went, {format_size(report.freed_bytes)}"
    if report.evicted_chunks:
        went += f" ({why(report.reasons)})"
    text = (
        f"{moment} {went}; {report.left_chunks} stay, {format_size(report.left_bytes)}; "
        f"{found.seconds:.1f} s"
    )
    return "; ".join([text, *(f"error: {error}" for error in report.errors)])
