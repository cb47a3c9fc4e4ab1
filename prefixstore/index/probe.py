"""Whether an LMDB file can be read without dying, tried out in a child process.

A truncated file is SIGBUS, a zeroed page an abort, and neither is an exception; so the child takes
it. It walks every page and every value for as long as ``PROBE_S`` and must say so in the end: any
other way to stop, a signal or a hang included, condemns the file. What it had no time for stays
unproven; values still carry checksums, and a crash there is not repeated, because the next opening
finds no note of a clean close and probes again.
"""

import enum
import json
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["PROBE_S", "Verdict", "probe"]

PROBE_S = 2.0
"""How long an opening may be held up by reading: about a million chunks, warm."""
HANG_S = 10.0
"""Added for the child's start; a file that makes it hang longer is as bad as one that kills it."""
ANSWER_BYTES_MAX = 4096

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from prefixstore.index.probe_child import main; main(sys.argv[2], float(sys.argv[3]))"
)


class Verdict(enum.Enum):
    """What a probe found."""

    FIT = "fit"
    """Everything that there was time for could be read and passed its checks."""
    DAMAGED = "damaged"
    """The child died, hung or found a contradiction."""


def probe(path: Path, *, within_s: float = PROBE_S, hang_s: float = HANG_S) -> Verdict:
    """Have a child process read the environment at ``path``.

    Raises nothing: without a child there is no proof, and no proof means ``DAMAGED``.
    """
    modules = [os.fspath(Path(__file__).parents[2]), *sys.path]
    command = [sys.executable, "-I", "-S", "-c", START, json.dumps(modules), os.fspath(path)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, our own code
            [*command, str(within_s)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=within_s + hang_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return Verdict.DAMAGED
    fit = done.returncode == 0 and done.stdout[:ANSWER_BYTES_MAX].strip() == b"fit"
    return Verdict.FIT if fit else Verdict.DAMAGED
