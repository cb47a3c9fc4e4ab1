"""The installed command in processes of its own: exit codes, streams, pipes and what is imported."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

Prefixstore = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = ("rich", "numpy", "torch", "vllm", "lmdb", "zstandard", "hypothesis")


@pytest.fixture
def prefixstore(tmp_path: Path) -> Prefixstore:
    """Return a function that runs the installed command."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "prefixstore.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )

    return run


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that running ``code`` imports."""
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.partition(".")[0] for name in json.loads(found.stdout.splitlines()[-1])}


def test_a_day_in_the_life_of_a_root(tmp_path: Path, prefixstore: Prefixstore) -> None:
    """Made, looked at, cleaned up: documents on stdout, nothing on stderr, exit code 0."""
    root = str(tmp_path / "root")
    outcomes = [
        prefixstore("init", root),
        prefixstore("stats", root, "--json"),
        prefixstore("ls", root, "--json"),
        prefixstore("verify", root, "--json"),
        prefixstore("gc", root, "--max-bytes", "1GiB", "--json"),
    ]

    assert [(outcome.returncode, outcome.stderr) for outcome in outcomes] == [(0, "")] * 5
    assert [json.loads(outcome.stdout) for outcome in outcomes[2:3]] == [[]]


def test_errors_are_messages_and_exit_codes(tmp_path: Path, prefixstore: Prefixstore) -> None:
    """No traceback, whatever is wrong."""
    nowhere = prefixstore("stats", str(tmp_path / "nowhere"))
    other = prefixstore("stats", str(tmp_path))
    usage = prefixstore("gc", str(tmp_path))

    assert (nowhere.returncode, other.returncode, usage.returncode) == (1, 2, 2)
    for outcome in (nowhere, other, usage):
        assert outcome.stdout == ""
        assert "Error: " in outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert "[Errno" not in outcome.stderr


def test_help_shows_an_example_of_every_verb(prefixstore: Prefixstore) -> None:
    """Each verb is listed, and its help ends with a command line to copy."""
    listing = prefixstore("--help").stdout
    for verb in (
        "init",
        "stats",
        "ls",
        "verify",
        "scrub",
        "repair",
        "export",
        "import",
        "gc",
        "rm",
    ):
        assert verb in listing
        assert f"Example: prefixstore {verb} " in prefixstore(verb, "--help").stdout


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, prefixstore: Prefixstore) -> None:
    """``prefixstore ... | head -1`` ends quietly."""
    root = str(tmp_path / "root")
    prefixstore("init", root)
    command = f"{sys.executable} -m prefixstore.cli stats {root} | true"
    outcome = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )

    assert outcome.stderr == ""


INTERRUPTED = """
import os, signal, click
from prefixstore.cli.main import cli, main

@click.command()
def wait():
    os.kill(os.getpid(), signal.SIGINT)

cli.get_command = lambda ctx, name: wait
main(["stats"])
"""


def test_an_interrupt_ends_with_130() -> None:
    """Ctrl-C in the middle of a verb is told as such, without a traceback."""
    outcome = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )

    assert outcome.returncode == 130
    assert outcome.stderr.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in outcome.stderr


def test_help_imports_nothing_heavy() -> None:
    """The command answers before heavy modules would have been read."""
    code = "from prefixstore.cli.main import run; run(['--help'])"

    assert not imported_by(code) & set(HEAVY)


def test_importing_the_package_is_cheap() -> None:
    """``import prefixstore`` reads nothing but itself; its names are found when they are used."""
    assert not imported_by("import prefixstore") & {*HEAVY, "msgspec", "click", "asyncio"}
    assert not imported_by("from prefixstore import PrefixStore") & {
        "rich",
        "numpy",
        "torch",
        "vllm",
        "lmdb",
        "click",
    }


def test_a_root_is_exported_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """Prometheus finds the page under the printed address; SIGTERM ends the exporter in order."""
    root = str(tmp_path / "root")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "prefixstore.cli"]
    subprocess.run([*command, "init", root], check=True, timeout=60, env=environment)
    with subprocess.Popen(
        [*command, "stats", root, "--serve", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as exporter:
        try:
            said = exporter.stderr.readline()
            address = said.split()[1]
            page = ""
            while "prefixstore_root_up 1.0" not in page:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    page = answer.read().decode()
                time.sleep(0.05)
            exporter.terminate()
            assert exporter.wait(60) == 0
        finally:
            exporter.kill()


def test_no_verb_needs_the_engine_to_explain_itself() -> None:
    """All verbs together import nothing heavy until one of them works."""
    code = (
        "import click; from prefixstore.cli.main import VERBS, cli; context = click.Context(cli)\n"
        "assert all(cli.get_command(context, verb) for verb in VERBS)"
    )

    assert not imported_by(code) & set(HEAVY)
