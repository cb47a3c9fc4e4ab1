"""How long the command takes to answer: a process from its start to its end, by what it is asked.

The interpreter alone is beside it; the difference is ours.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Report, Table, add_report_options, describe_machine

COMMAND = (sys.executable, "-m", "prefixstore.cli")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=15, help="runs of each; the median is told")
    add_report_options(parser)
    options = parser.parse_args()
    report = Report(about=str(__doc__), machine=describe_machine(options.directory))
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = str(Path(directory) / "root")
        index = ("--index-dir", str(Path(directory) / "index"))
        subprocess.run([*COMMAND, "init", root], check=True, capture_output=True)
        asked = {
            "the interpreter alone": (sys.executable, "-c", ""),
            "--version": (*COMMAND, "--version"),
            "--help": (*COMMAND, "--help"),
            "verify --help": (*COMMAND, "verify", "--help"),
            "stats of an empty root": (*COMMAND, "stats", root, *index),
            "verify of an empty root": (*COMMAND, "verify", root, *index),
        }
        for name, command in asked.items():
            took_s = [_run_s(command) for _ in range(options.times)]
            report.measurements.append({"command": name, "took_s": took_s})
            milliseconds = (statistics.median(took_s), min(took_s), max(took_s))
            rows.append((name, *(f"{1e3 * each:.0f}" for each in milliseconds)))
    columns = ("command", "median ms", "lowest", "highest")
    report.tables.append(Table(title="start to end", columns=columns, rows=rows))
    report.publish(options)


def _run_s(command: tuple[str, ...]) -> float:
    began_s = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began_s
