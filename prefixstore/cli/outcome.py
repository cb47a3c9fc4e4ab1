"""What evictions and removals have to say, as text and as an exit code."""

import datetime as dt
from typing import TYPE_CHECKING

import click

from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.store import EvictionReport

__all__ = ["echo_done", "echo_plan", "exit_code", "why"]

REASONS = {
    "space": "least recently used",
    "age": "too old",
    "namespace": "limit of the namespace",
    "asked": "asked for",
}


def why(reasons: dict[str, int]) -> str:
    """Say how many chunks go for each reason."""
    return ", ".join(
        f"{count} {REASONS.get(name, name)}" for name, count in sorted(reasons.items())
    )


def echo_plan(plan: "EvictionReport", *, err: bool = False) -> None:
    """Say what would go and what would stay."""
    if plan.planned_chunks:
        click.echo(
            f"To remove: {plan.planned_chunks} chunks, {format_size(plan.planned_bytes)} "
            f"({why(plan.reasons)}).",
            err=err,
        )
        for group in plan.groups:
            click.echo(
                f"  {group.namespace}: {group.chunks} chunks, {format_size(group.file_bytes)}, "
                f"{REASONS.get(group.reason, group.reason)}, last used "
                f"{_moment(group.oldest_s)} to {_moment(group.newest_s)}",
                err=err,
            )
    else:
        click.echo("Nothing to remove.", err=err)
    click.echo(f"To keep:   {plan.left_chunks} chunks, {format_size(plan.left_bytes)}.", err=err)
    _echo_trouble(plan)


def echo_done(done: "EvictionReport") -> None:
    """Say what went and what stays."""
    click.echo(f"Removed {done.evicted_chunks} chunks, {format_size(done.freed_bytes)}.")
    for reason, count in sorted(done.kept.items()):
        click.echo(f"Kept {count} that were planned: {reason.replace('_', ' ')}.")
    click.echo(f"{done.left_chunks} chunks stay, {format_size(done.left_bytes)}.")
    _echo_trouble(done)


def exit_code(report: "EvictionReport") -> int:
    """Return 1 if something failed or the limit could not be kept, else 0."""
    return 1 if report.errors or report.short_bytes else 0


def _moment(used_s: int) -> str:
    return f"{dt.datetime.fromtimestamp(used_s, tz=dt.UTC):%Y-%m-%d %H:%M}Z"


def _echo_trouble(report: "EvictionReport") -> None:
    if report.short_bytes:
        click.echo(
            f"Warning: {format_size(report.short_bytes)} above the limit: the rest is pinned or in use.",
            err=True,
        )
    for error in report.errors:
        click.echo(f"Error: {error}", err=True)
