"""The verbs that need an engine, as processes of their own, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDES_VLLM = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
"""


def run(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in an environment without vLLM."""
    (directory / "sitecustomize.py").write_text(HIDES_VLLM)
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "prefixstore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(directory / "cache"), "PYTHONPATH": path},
    )


@pytest.mark.parametrize(
    "words",
    [
        ("prefill", "model", "--root", "{root}", "--prompts", "p.txt"),
        ("ls", "{root}", "--prompts", "p.txt", "--model", "model"),
        ("rm", "{root}", "--prompts", "p.txt", "--model", "model", "--yes"),
        ("pin", "{root}", "name", "--prompts", "p.txt", "--model", "model"),
    ],
    ids=lambda words: words[0],
)
def test_without_vllm_a_verb_says_what_is_missing(words: tuple[str, ...], tmp_path: Path) -> None:
    """One message and the exit code of a wrong command line, no traceback."""
    root = str(tmp_path / "root")
    assert run(tmp_path, "init", root).returncode == 0
    done = run(tmp_path, *(word.format(root=root) for word in words))

    assert done.returncode == 2
    assert "vLLM is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_end_of_a_pin_needs_a_pin(tmp_path: Path) -> None:
    """Prefill says so before an engine is looked for."""
    words = ("prefill", "model", "--root", str(tmp_path / "root"), "--prompts", "p.txt")
    done = run(tmp_path, *words, "--for", "3d")

    assert done.returncode == 2
    assert "--pin" in done.stderr
