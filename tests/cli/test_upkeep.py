"""``scrub``, ``repair``, asking before something goes, and what a shell completes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefixstore.testing.chains import chain
from tests.cli.conftest import Fill, Run

CHAINED = {"groups": [{"kind": "FullAttentionSpec"}]}
PATIENCE_S = 60


def blobs(root: str) -> list[Path]:
    return sorted(Path(root).glob("ns/*/*/*/*.kv"))


def lose_the_fifth(root: str) -> None:
    """Make a chain of ten a beginning of four and an end of five that nothing leads to."""
    (path,) = Path(root).glob(f"ns/*/*/*/{chain('a', 10)[4].hex()}.kv")
    path.unlink()
    for each in blobs(root):
        os.utime(each, (1, 1))


# repair


def test_repair_plans_asks_and_says_what_it_did(root: str, run: Run, fill: Fill) -> None:
    """A dry run changes nothing, no is no, yes drops what follows nothing."""
    fill("a", **CHAINED)
    lose_the_fifth(root)
    dry = run("repair", root, "--dry-run")
    assert (dry.code, len(blobs(root))) == (0, 9)
    assert "Would have dropped 5 chunks" in dry.out

    refused = run("repair", root, answer="n\n")
    assert (refused.code, len(blobs(root))) == (1, 9)
    assert "To drop: 5 chunks" in refused.out

    agreed = run("repair", root, answer="y\n")
    assert (agreed.code, len(blobs(root))) == (0, 4)
    assert "Rebuilt this host's index: 9 chunks" in agreed.out
    assert "Dropped 5 chunks" in agreed.out


def test_repair_of_a_sound_root_asks_nothing(root: str, run: Run, fill: Fill) -> None:
    """Rebuilding an index destroys nothing."""
    fill("a", **CHAINED)
    found = run("repair", root, "--json")

    assert found.code == 0
    assert (found.json["indexed_chunks"], found.json["dropped_chunks"]) == (10, 0)
    assert run("stats", root, "--json").json["chunks"] == 10


# scrub


def test_scrub_checks_and_moves_damage(root: str, run: Run, fill: Fill) -> None:
    """Findings end with 1, the next pass with 0."""
    fill("a")
    blobs(root)[0].write_bytes(b"x" * 8192)
    found = run("scrub", root, "--rate", "0", "--json")
    assert (found.code, found.json["reasons"]) == (1, {"header": 1})
    again = run("scrub", root, "--rate", "0")

    assert (again.code, again.out) == (0, "done: 9 blobs, 108.0 KiB checked: all sound\n")
    assert run("stats", root, "--json").json["quarantine_files"] == 1


def test_scrub_watch_ends_with_a_signal_and_goes_on_later(root: str, run: Run, fill: Fill) -> None:
    """SIGTERM in the middle of a slow pass ends it with 0; another run has less to do."""
    fill("a")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefixstore.cli",
            "scrub",
            root,
            "--watch",
            "--json",
            "--rate",
            "24KiB",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(Path(root).glob("scrub/*.json")):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()

    assert (process.returncode, err) == (0, "")
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["stopped"]
    assert run("scrub", root, "--rate", "0", "--json").json["state"] == "done"


# verify


@pytest.mark.parametrize(("sample", "checked"), [("100%", 40), ("1000", 40), ("1", 40)])
def test_verify_takes_shares_and_numbers(
    root: str, run: Run, fill: Fill, sample: str, checked: int
) -> None:
    """All of it, or more than there is, is all of it."""
    fill("a", "b", "c", "d")
    assert run("verify", root, "--sample", sample, "--json").json["checked_chunks"] == checked


def test_verify_draws_about_as_many_as_asked(root: str, run: Run, fill: Fill) -> None:
    """A number is a share of what is there; no share and no number is a usage error."""
    fill("a", "b", "c", "d")
    seed = ("--seed", "7", "--json")
    assert (
        run("verify", root, "--sample", "20", *seed).json
        == run("verify", root, "--sample", "50%", *seed).json
    )
    for wrong in ("0", "101%", "many", "-1", "0%"):
        assert run("verify", root, f"--sample={wrong}").code == 2


# Asking.


@pytest.mark.parametrize(
    "arguments", [("gc", "--max-bytes", "0"), ("rm", "--older-than", "0"), ("repair",)]
)
def test_verbs_that_destroy_say_what_to_do_when_nobody_answers(
    root: str, run: Run, fill: Fill, arguments: tuple[str, ...]
) -> None:
    """Without a terminal and without --yes nothing goes, and the exit code is that of a wrong call."""
    fill("a", **CHAINED)
    lose_the_fifth(root)
    before = blobs(root)
    outcome = run(arguments[0], root, *arguments[1:])

    assert (outcome.code, blobs(root)) == (2, before)
    assert "--yes" in outcome.err
    assert "--dry-run" in outcome.err


# Completion.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script(shell: str) -> None:
    """What the documentation tells to evaluate names the command."""
    found = completed({"_PREFIXSTORE_COMPLETE": f"{shell}_source"})

    assert "prefixstore" in found
    assert f"{shell}_complete" in found


def test_verbs_options_and_directories_are_completed() -> None:
    """The verbs by their beginning, a verb's options, directories for ROOT."""
    assert completion("prefixstore s") == [
        "plain,scrub",
        "plain,serve",
        "plain,size",
        "plain,stats",
    ]
    assert completion("prefixstore repair /mnt/kv --d") == ["plain,--dry-run"]
    assert completion("prefixstore repair /mn") == ["dir,/mn"]


def completion(line: str) -> list[str]:
    words = line.split()
    return completed(
        {
            "_PREFIXSTORE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
    ).splitlines()


def completed(environment: dict[str, str]) -> str:
    """Run the command as a shell does for a completion."""
    return subprocess.run(
        [sys.executable, "-m", "prefixstore.cli"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    ).stdout
