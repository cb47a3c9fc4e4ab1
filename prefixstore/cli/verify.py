"""``prefixstore verify``: check the bytes of every blob."""

import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT, SIZE, open_store
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.keys import NamespaceId
    from prefixstore.ops.verify import VerifyReport
    from prefixstore.store import PrefixStore

__all__ = ["command"]

PROGRESS_S = 1.0
PERCENT = 100


class _Sample(click.ParamType["float | int"]):
    """How many blobs to check: ``5%`` and ``0.05`` are shares, whole numbers above 1 are counts."""

    name = "sample"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | int:
        """Read the text."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (PERCENT if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if 0 < share <= 1:
            return share
        if text.isdecimal() and int(text) > 1:
            return int(text)
        problem = f"{text!r} is no share like 5% or 0.05, and no number of blobs"
        raise click.BadParameter(problem, ctx=ctx, param=param)


def _share(store: "PrefixStore", sample: "float | int", namespace: "NamespaceId | None") -> float:
    """Return a sample as a share of the blobs that are there now."""
    if isinstance(sample, float):
        return sample
    namespaces = store.root.namespaces() if namespace is None else [namespace]
    there = sum(len(leaf) for each in namespaces for _, leaf in store.tree.scan(each))
    return min(1.0, sample / max(1, there))


@click.command("verify", epilog="Example: prefixstore verify /mnt/kv --sample 0.05 --rate 200MB")
@ROOT
@click.option(
    "--sample",
    type=_Sample(),
    default="1.0",
    metavar="SHARE",
    help="Check this share of the blobs, drawn anew each time (5% or 0.05 is one in twenty), or about "
    "so many (1000).",
)
@click.option("--seed", type=click.IntRange(0), help="Draw the lot that an earlier run drew.")
@click.option("--namespace", metavar="ID", help="Only this namespace; the id's beginning suffices.")
@click.option(
    "--quarantine", is_flag=True, help="Move damaged blobs aside, so they are stored anew."
)
@click.option("--rate", type=SIZE, metavar="SIZE", help="Read at most so much a second.")
@INDEX_DIR
@JSON
def command(
    root: str,
    *,
    sample: "float | int",
    seed: int | None,
    namespace: str | None,
    quarantine: bool,
    rate: float | None,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Check the bytes of the blobs in ROOT. Exits with 1 if anything is wrong with one."""
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.ops.removal import find_namespace
    from prefixstore.ops.verify import verify

    with open_store(root, index_dir=index_dir, read_only=not quarantine) as store:
        chosen = find_namespace(store.root, namespace) if namespace is not None else None
        found = verify(
            store,
            namespace=chosen,
            sample=_share(store, sample, chosen),
            seed=secrets.randbits(32) if seed is None else seed,
            quarantine=quarantine,
            rate_bytes_s=rate,
            progress=_Progress(),
        )
    if as_json:
        echo_json(found)
    else:
        _echo(found)
    return 0 if found.is_clean else EXIT_FAILED


class _Progress:
    """Tells a terminal how far the scrub has come, once a second."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._next_s = time.monotonic() + PROGRESS_S

    def __call__(self, chunks: int, size_bytes: int) -> None:
        """Take the sums so far."""
        if self._shows and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_S
            click.echo(f"\r{chunks} blobs, {format_size(size_bytes)} checked", nl=False, err=True)


def _echo(found: "VerifyReport") -> None:
    for finding in found.findings:
        place = " (moved to quarantine)" if finding.quarantined else ""
        click.echo(f"{finding.reason}: {finding.detail or finding.path}{place}")
    hidden = sum(found.reasons.values()) - len(found.findings)
    if hidden:
        click.echo(f"... {hidden} more findings")
    for error in found.errors:
        click.echo(f"Error: not checked: {error}", err=True)
    skipped = f", {found.skipped_chunks} passed over (seed {found.seed})"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.reasons.items()))
    click.echo(
        f"{found.checked_chunks} blobs, {format_size(found.checked_bytes)} checked"
        f"{skipped if found.skipped_chunks else ''}: {reasons or 'all sound'}"
    )
