"""What people see of a prefill: a bar on a terminal, a line now and then elsewhere, a report at its end."""

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from prefixstore.vllm.offline.driver import Progress
    from prefixstore.vllm.offline.prefill import PrefillReport

__all__ = ["Shown", "echo_report"]

SHOW_S = 0.2
SAY_S = 30.0
"""A log gets a line so often."""
FAILURES_SHOWN = 20
MIB = 2**20


class Shown:
    """Shows progress on stderr. A context manager, used by one thread."""

    def __init__(self, prompts: int) -> None:
        self._started_s = time.monotonic()
        self._next_s = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._prompts = prompts

    def __enter__(self) -> Self:
        """Start the bar, if somebody can see it."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                MofNCompleteColumn(),
                TextColumn("prompts"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("prefill", total=self._prompts, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: "Progress") -> None:
        """Show how far it has come; cheap when called often."""
        now_s = time.monotonic()
        is_last = progress.done_prompts == progress.prompts
        if now_s < self._next_s and not is_last:
            return
        self._next_s = now_s + (SHOW_S if self._bar is not None else SAY_S)
        figures = _figures(progress, now_s - self._started_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done_prompts, figures=figures)
        else:
            left = time_left_s(progress, now_s - self._started_s)
            rest = "" if left is None or is_last else f", {left:.0f} s left"
            sys.stderr.write(
                f"{progress.done_prompts} of {progress.prompts} prompts, {figures}{rest}\n"
            )


def time_left_s(progress: "Progress", elapsed_s: float) -> float | None:
    """Estimate the time left by the tokens that are done; None before any is."""
    if not progress.done_tokens or not elapsed_s:
        return None
    return elapsed_s * (progress.tokens - progress.done_tokens) / progress.done_tokens


def echo_report(report: "PrefillReport") -> None:
    """Print the report for people."""
    rate = report.computed_tokens / report.elapsed_s if report.elapsed_s else 0.0
    lines = [
        f"{report.prompts} prompts, {report.tokens} tokens, in namespace {report.namespace}",
        (
            f"computed {report.computed_prompts}, skipped {report.skipped_prompts} that were stored, "
            f"failed {len(report.failed)}"
        ),
        (
            f"stored {report.stored_chunks} of {report.chunks} chunks, "
            f"{report.stored_bytes / MIB:.1f} MiB; {report.computed_tokens} tokens computed in "
            f"{report.elapsed_s:.1f} s ({rate:.0f} a second), {report.cached_tokens} not computed again"
        ),
        f"{report.tail_tokens} tokens are behind the last whole chunk of their prompt: not storable",
    ]
    if report.short_prompts:
        lines.append(f"{report.short_prompts} prompts are shorter than a chunk: nothing to store")
    if report.pin is not None:
        lines.append(f"pinned as {report.pin!r}")
    lines += [f"line {each.line}: {each.error}" for each in report.failed[:FAILURES_SHOWN]]
    if len(report.failed) > FAILURES_SHOWN:
        lines.append(f"... {len(report.failed) - FAILURES_SHOWN} more failed")
    sys.stdout.write("\n".join(lines) + "\n")


def _figures(progress: "Progress", elapsed_s: float) -> str:
    rate = progress.computed_tokens / elapsed_s if elapsed_s else 0.0
    figures = f"{rate:.0f} tokens/s, {progress.stored_bytes / MIB:.1f} MiB stored"
    if progress.waiting_prompts:
        figures += f", {progress.waiting_prompts} at another host"
    return figures
