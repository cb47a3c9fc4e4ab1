"""``prefixstore verify``: check the bytes of every blob."""

import secrets
import sys
import time
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import INDEX_DIR, JSON, ROOT, SIZE, open_store
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.verify import VerifyReport

__all__ = ["command"]

PROGRESS_S = 1.0


@click.command("verify", epilog="Example: prefixstore verify /mnt/kv --sample 0.05 --rate 200MB")
@ROOT
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    metavar="SHARE",
    help="Check this share of the blobs, drawn anew each time (0.05 is one in twenty).",
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
    sample: float,
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
        found = verify(
            store,
            namespace=find_namespace(store.root, namespace) if namespace is not None else None,
            sample=sample,
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
