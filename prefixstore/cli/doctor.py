"""``prefixstore doctor``: what a store can expect of a filesystem."""

import threading
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import JSON, ROOT, SIZE, note
from prefixstore.cli.render import echo_json, echo_table
from prefixstore.cli.units import format_size
from prefixstore.errors import UnavailableError

if TYPE_CHECKING:
    from prefixstore.ops.doctor import Diagnosis

__all__ = ["command"]

HANG_S = 30.0
"""No step of the doctor's takes half of this on a filesystem that can hold a store."""
SIZE_DEFAULT = "64MiB"
MICROS_SHOWN_MAX = 1000


@click.command("doctor", epilog="Example: prefixstore doctor /mnt/kv --json | jq .settings")
@ROOT
@click.option(
    "--size",
    type=SIZE,
    default=SIZE_DEFAULT,
    show_default=True,
    metavar="SIZE",
    help="Write and read this much to measure bandwidth; 0 for none.",
)
@click.option(
    "--hang-after",
    type=float,
    default=HANG_S,
    show_default=True,
    metavar="SECONDS",
    help="Call a step that takes longer a hang, and stop.",
)
@JSON
def command(root: str, *, size: float, hang_after: float, as_json: bool) -> int:
    """Try what the filesystem of ROOT does: calls that a store relies on, times, speed.

    ROOT is a store or a directory that is to hold one; engines may use it meanwhile. Nothing stays there.
    """
    from prefixstore.cli.main import EXIT_FAILED

    found = _watched(root, size_bytes=int(size), hang_s=hang_after)
    echo_json(found) if as_json else _echo(found)
    return 0 if found.fit else EXIT_FAILED


def _watched(root: str, *, size_bytes: int, hang_s: float) -> "Diagnosis":
    """Run the doctor in a thread that can be given up: on a hung mount nothing ends a system call.

    Raises:
        UnavailableError: A step hangs; the error names it.
        PrefixStoreError: As the doctor says.
    """
    from prefixstore.clock import SystemClock
    from prefixstore.ops.doctor import Diagnosis, diagnose
    from prefixstore.tree.osfs import RealOs

    outcomes: list[Diagnosis | BaseException] = []
    moved, stopped = threading.Event(), threading.Event()
    steps = ["start"]

    def begin(step: str) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt  # Unwinds the doctor, which takes its files away.
        note(f"{step} ...")
        steps.append(step)
        moved.set()

    def work() -> None:
        try:
            outcomes.append(
                diagnose(
                    root,
                    os_calls=RealOs(),
                    clock=SystemClock(),
                    size_bytes=size_bytes,
                    begin=begin,
                )
            )
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            outcomes.append(error)
        moved.set()

    thread = threading.Thread(target=work, name="doctor", daemon=True)
    thread.start()
    try:
        while not outcomes:
            if not moved.wait(hang_s):
                raise UnavailableError(
                    f"{root} hangs: {steps[-1]!r} has taken {hang_s:.0f} s. Look at the mount and its "
                    "server; a directory .prefixstore-doctor-* may be left in it"
                )
            moved.clear()
    except KeyboardInterrupt:
        stopped.set()
        thread.join(hang_s)
        raise
    (outcome,) = outcomes
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _echo(found: "Diagnosis") -> None:
    where = "one host only" if found.local else "may be shared"
    click.echo(f"{found.path}: {found.filesystem} ({where}), ", nl=False)
    click.echo("a store" if found.is_root else "no store yet")
    click.echo()
    echo_table(
        ("check", "grade", "result"), [(f.check, str(f.grade), f.result) for f in found.findings]
    )
    for finding in found.findings:
        if finding.meaning:
            click.echo(f"\n{finding.check}: {finding.meaning}")
    if found.latencies or found.bandwidths:
        click.echo()
        rows = [(t.operation, _span(t.median_s), _span(t.slowest_s)) for t in found.latencies]
        for b in found.bandwidths:
            kind = "page cache" if b.cached else "direct"
            rows.append((f"{b.operation}, {kind}", f"{format_size(int(b.bytes_per_s))}/s", ""))
        echo_table(("operation", "median", "slowest"), rows, right=frozenset({1, 2}))
    if found.settings:
        click.echo("\nSettings to consider:")
        for name, value in found.settings.items():
            click.echo(f"  {name} = {value}    {found.reasons[name]}")
    for error in found.errors:
        click.echo(f"Error: {error}", err=True)
    verdict = "fit for a store" if found.fit else "not fit for a store"
    click.echo(f"\n{found.path} is {verdict}.")


def _span(duration_s: float) -> str:
    micros = duration_s * 1e6
    return f"{micros:.0f} us" if micros < MICROS_SHOWN_MAX else f"{micros / 1e3:.1f} ms"
