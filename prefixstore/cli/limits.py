"""``prefixstore limits``: what all hosts of a root keep to."""

from typing import TYPE_CHECKING, TypeVar

import click

from prefixstore.cli.options import AGE, JSON, ROOT, SIZE
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_age, format_size, parse_size

if TYPE_CHECKING:
    from prefixstore.tree.limits import LimitsDocument
    from prefixstore.tree.root import Root

__all__ = ["command", "limit_lines"]

T = TypeVar("T")


@click.command(
    "limits", epilog="Example: prefixstore limits /mnt/kv --max-bytes 500GiB --max-age 30d"
)
@ROOT
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="What all chunks may take.")
@click.option("--min-free", type=SIZE, metavar="SIZE", help="What the filesystem must have free.")
@click.option("--max-age", type=AGE, metavar="AGE", help="Nothing stays unused for so long.")
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    metavar="ID=SIZE",
    help="What one namespace may take; the id's beginning suffices, a size of 0 lifts it. Repeatable.",
)
@click.option("--clear", is_flag=True, help="Lift all limits first.")
@JSON
def command(
    root: str,
    *,
    max_bytes: float | None,
    min_free: float | None,
    max_age: float | None,
    namespaces: tuple[str, ...],
    clear: bool,
    as_json: bool,
) -> None:
    """Set limits for ROOT, or show them. 0 lifts one; what is not named stays as it is.

    Engines follow within ten seconds, and evict by themselves.
    """
    from prefixstore.tree.limits import LimitsDocument, read_limits, remove_limits, write_limits
    from prefixstore.tree.root import Root

    opened = Root.open(root)
    changes = (max_bytes, min_free, max_age, *namespaces)
    now = LimitsDocument() if clear else read_limits(opened) or LimitsDocument()
    if clear or any(change is not None for change in changes):
        quotas = {**now.namespaces, **_of_namespaces(opened, namespaces)}
        now = LimitsDocument(
            max_bytes=_changed(now.max_bytes, None if max_bytes is None else int(max_bytes)),
            min_free_bytes=now.min_free_bytes if min_free is None else int(min_free),
            max_age_s=_changed(now.max_age_s, max_age),
            namespaces={name: quota for name, quota in quotas.items() if quota},
        )
        if now == LimitsDocument():
            remove_limits(opened)
        else:
            write_limits(opened, now)
    if as_json:
        echo_json(now)
        return
    for name, value in limit_lines(now) or [("limits", "none")]:
        click.echo(f"{name:12}{value}")


def limit_lines(limits: "LimitsDocument") -> list[tuple[str, str]]:
    """Return each limit that is set, by what people call it."""
    lines: list[tuple[str, str]] = []
    if limits.max_bytes is not None:
        lines.append(("max size", format_size(limits.max_bytes)))
    if limits.min_free_bytes:
        lines.append(("min free", format_size(limits.min_free_bytes)))
    if limits.max_age_s is not None:
        lines.append(("max age", format_age(limits.max_age_s)))
    lines += [(name[:10], format_size(quota)) for name, quota in sorted(limits.namespaces.items())]
    return lines


def _changed(now: T | None, wanted: T | None) -> T | None:
    """Return what a limit becomes: as it is if nothing is wanted, lifted by 0."""
    return now if wanted is None else wanted or None


def _of_namespaces(root: "Root", texts: tuple[str, ...]) -> dict[str, int]:
    from prefixstore.errors import InvalidError
    from prefixstore.ops.removal import find_namespace

    quotas: dict[str, int] = {}
    for text in texts:
        name, equals, size = text.partition("=")
        if not equals:
            raise InvalidError(f"--namespace {text!r}: write it like 3f9a=100GiB")
        quotas[find_namespace(root, name)] = parse_size(size)
    return quotas
