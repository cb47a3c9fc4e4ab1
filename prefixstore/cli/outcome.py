"""What evictions and removals have to say, as text and as an exit code."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.store import EvictionReport

__all__ = ["echo_done", "echo_plan", "exit_code"]

REASONS = {"space": "least recently used", "age": "too old", "asked": "asked for"}


def echo_plan(plan: "EvictionReport", *, err: bool = False) -> None:
    """Say what would go and what would stay."""
    if plan.planned_chunks:
        why = ", ".join(f"{count} {REASONS.get(r, r)}" for r, count in sorted(plan.reasons.items()))
        click.echo(
            f"To remove: {plan.planned_chunks} chunks, {format_size(plan.planned_bytes)} ({why}).",
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


def _echo_trouble(report: "EvictionReport") -> None:
    if report.short_bytes:
        click.echo(
            f"Warning: {format_size(report.short_bytes)} above the limit: the rest is pinned or in use.",
            err=True,
        )
    for error in report.errors:
        click.echo(f"Error: {error}", err=True)
