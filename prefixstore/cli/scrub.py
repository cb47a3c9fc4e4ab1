"""``prefixstore scrub``: check all blobs, slowly; once, or again and again."""

import datetime as dt
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, JSON, ROOT, SIZE, note
from prefixstore.cli.render import echo_json
from prefixstore.cli.signals import stopped_by_signals
from prefixstore.cli.units import format_age, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefixstore.ops.scrub import ScrubPass
    from prefixstore.store import PrefixStore

__all__ = ["command"]


@click.command("scrub", epilog="Example: prefixstore scrub /mnt/kv --watch --rate 20MB")
@ROOT
@click.option("--watch", is_flag=True, help="Stay, and make a pass after each interval.")
@click.option(
    "--rate",
    type=SIZE,
    default="100MB",
    show_default=True,
    metavar="SIZE",
    help="Read at most so much a second; 0 for no limit.",
)
@click.option(
    "--interval",
    type=AGE,
    default="7d",
    show_default=True,
    metavar="AGE",
    help="With --watch: from the end of a pass, whoever made it, to the next.",
)
@JSON
def command(root: str, *, watch: bool, rate: float, interval: float, as_json: bool) -> int:
    """Check every blob of ROOT, and move damaged ones into the quarantine.

    A pass that was ended, by SIGTERM, SIGINT or a crash, goes on where it was when the command is run again,
    on whichever host. Of several hosts that scrub one root, one works at a time.
    """
    from prefixstore.cli.main import EXIT_FAILED
    from prefixstore.clock import SystemClock
    from prefixstore.ops.scrub import scrub, watch_scrub

    rate_bytes_s = rate or None
    with stopped_by_signals() as stop, _opened(root) as store:
        if not watch:
            note(f"Scrubbing {root} ...")
            found = scrub(store, rate_bytes_s=rate_bytes_s, stop=stop, clock=SystemClock())
            echo_json(found) if as_json else click.echo(_text(found))
            return 0 if found.is_clean and found.state == "done" else EXIT_FAILED
        turns = watch_scrub(
            store,
            interval_s=interval,
            rate_bytes_s=rate_bytes_s,
            stop=stop,
            clock=SystemClock(),
        )
        for each in turns:
            moment = f"{dt.datetime.fromtimestamp(time.time(), tz=dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
            click.echo(_json_line(each) if as_json else f"{moment} {_text(each)}")
    return 0


@contextmanager
def _opened(root: str) -> "Iterator[PrefixStore]":
    """Open a root without an index: a scrub asks the tree alone."""
    from prefixstore.config import StoreConfig
    from prefixstore.store import PrefixStore

    with PrefixStore.open(root, config=StoreConfig(), create=False, index=None) as store:
        yield store


def _json_line(found: "ScrubPass") -> str:
    import msgspec

    return msgspec.json.encode(found).decode()


def _text(found: "ScrubPass") -> str:
    if found.state == "left":
        return "left to another host, which scrubs right now"
    if found.state == "waiting":
        return f"waiting: the next pass is due in {format_age(found.wait_s)}"
    lines = [f"error: {error}" for error in found.errors]
    if found.state != "failed":
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.reasons.items()))
        lines.insert(
            0,
            f"{found.checked_chunks} blobs, {format_size(found.checked_bytes)} checked: "
            f"{reasons or 'all sound'}",
        )
    for finding in found.findings:
        place = "moved to quarantine" if finding.quarantined else "left where it is"
        lines.append(f"{finding.reason}: {finding.detail or finding.path} ({place})")
    return f"{found.state}: " + "; ".join(lines)
