"""Progress on a terminal: a bar on stderr with bytes, speed and time left. Scripts are spared."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bytes_progress"]


@contextmanager
def bytes_progress(what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of bytes as they are done.

    Args:
        what: What is being done.
        total_bytes: How much there is; None if nobody knows.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)
