"""Tidy: what prose alone would not keep, checked over the files that git tracks.

Each rule collects its offences as `path:line: what` and compares them with the empty list, so a
failure reads as a list of things to mend. Rules that ruff, mypy or import-linter already keep are
not repeated here.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SELF = Path(__file__).relative_to(REPO)

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 600

# Words that hide what a thing does, each with what to write instead. Matched as parts of names
# that we define, never in prose.
BANNED_NAMES = {
    "util": "name the module after the one idea it holds",
    "utils": "name the module after the one idea it holds",
    "helper": "name what it does",
    "helpers": "name what they do",
    "misc": "name the module after the one idea it holds",
    "manager": "say what it keeps, plans or moves; Manager is vLLM's word, for subclasses of its own",
}
# vLLM's own interfaces are implemented under their own names.
MAY_SAY_MANAGER = ("prefixstore/vllm/", "tests/vllm/")

# Built from parts, so that this file does not offend itself.
LEFTOVERS = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b"
)
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/("
    + "|".join(("ho" + "me", "ro" + "ot", "Us" + "ers", "wo" + "rk", "op" + "t"))
    + r")/\w"
)

# Only these call the operating system or read the clock in the layers that tests drive with faults
# and with a clock of their own.
SEAM_PACKAGES = ("tree", "store", "ops", "blob", "policy")
SEAM_MODULES = {"prefixstore/tree/osfs.py"}
SEAM_FREE_CALLS = {"os.getpid", "os.fspath", "os.strerror"}
# Whether another process lives is asked of this host, not of the shared tree: signal 0 kills nobody.
# The benchmark takes its own directory away, and empties this host's page cache, as no store ever does.
SEAM_FREE_IN = {
    ("prefixstore/tree/writers.py", "os.kill"),
    ("prefixstore/ops/bench.py", "os.posix_fadvise"),
    ("prefixstore/ops/bench.py", "shutil.rmtree"),
    # An archive is a file of the user's, outside every root.
    ("prefixstore/ops/volumes.py", "os.fsync"),
}
# The starter of the I/O process hands the environment on, without a look at it.
ENVIRONMENT_READERS = ("prefixstore/cli/", "prefixstore/vllm/", "prefixstore/ioproc/process.py")


def tracked(suffix: str = "") -> list[Path]:
    """Return the tracked files that exist, relative to the repository."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [Path(name) for name in names if name.endswith(suffix) and (REPO / name).is_file()]


PYTHON = tracked(".py")
TREES = {path: ast.parse((REPO / path).read_bytes(), str(path)) for path in PYTHON}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, nested ones and methods included."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def defined_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of the module and of each class and function it defines."""
    yield 1, path.stem
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def words_of(name: str) -> set[str]:
    """Split a name in either case style: `TierManager_x` -> `{"tier", "manager", "x"}`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return {word.lower() for word in spaced.split("_") if word}


def texts() -> Iterator[tuple[Path, int, str]]:
    """Yield every line of every tracked text file but this one."""
    for path in tracked():
        if path == SELF:
            continue
        try:
            text = (REPO / path).read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            yield path, number, line


def dotted(node: ast.expr) -> str:
    """Return `os.path.join` for such an expression, or nothing."""
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_functions_are_short() -> None:
    """No function is longer than 70 lines."""
    offences = [
        f"{path}:{node.lineno}: {node.name} has {lines} lines"
        for path in PYTHON
        for node in functions(path)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert offences == []


def test_files_are_short() -> None:
    """No Python file is longer than 600 lines."""
    sizes = {path: len((REPO / path).read_text().splitlines()) for path in PYTHON}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_modules_say_what_they_own() -> None:
    """Every Python file opens with a docstring."""
    assert [str(path) for path in PYTHON if not ast.get_docstring(TREES[path])] == []


def test_tests_say_what_they_expect() -> None:
    """Every test function has a docstring, whose first line is one sentence."""
    offences = []
    for path in PYTHON:
        if path.parts[0] != "tests" and "testing" not in path.parts:
            continue
        for node in functions(path):
            if node.name.startswith("test_"):
                first = (ast.get_docstring(node) or "").partition("\n\n")[0]
                if not first.rstrip().endswith("."):
                    offences.append(f"{path}:{node.lineno}: {node.name}")
    assert offences == []


def test_names_say_what_things_do() -> None:
    """No module, class or function is named by a word that hides its work."""
    offences = [
        f"{path}:{line}: {name}: {BANNED_NAMES[word]}"
        for path in PYTHON
        for line, name in defined_names(path)
        for word in sorted(words_of(name) & BANNED_NAMES.keys())
        if not (word == "manager" and str(path).startswith(MAY_SAY_MANAGER))
    ]
    assert offences == []


def test_nothing_is_left_for_later() -> None:
    """No file carries a note to finish it."""
    offences = [
        f"{path}:{n}: {line.strip()}" for path, n, line in texts() if LEFTOVERS.search(line)
    ]
    assert offences == []


def test_no_path_of_one_machine() -> None:
    """No file names a directory that exists on one machine only."""
    offences = [
        f"{path}:{n}: {line.strip()}" for path, n, line in texts() if MACHINE_PATHS.search(line)
    ]
    assert offences == []


def test_the_seam_alone_calls_the_system() -> None:
    """Layers that are driven with faults and a test clock reach neither the OS nor the time."""
    offences = []
    for path in PYTHON:
        if path.parts[0] != "prefixstore" or path.parts[1] not in SEAM_PACKAGES:
            continue
        if str(path) in SEAM_MODULES:
            continue
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            banned = name == "open" or name.split(".")[0] in ("os", "shutil", "time", "tempfile")
            free = name in SEAM_FREE_CALLS or (str(path), name) in SEAM_FREE_IN
            if banned and not free:
                offences.append(f"{path}:{node.lineno}: {name}()")
    assert offences == []


def test_the_edges_alone_read_the_environment() -> None:
    """Environment variables are read where a user is near: in cli and vllm."""
    offences = [
        f"{path}:{node.lineno}: {dotted(node)}"
        for path in PYTHON
        if path.parts[0] == "prefixstore" and not str(path).startswith(ENVIRONMENT_READERS)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv")
    ]
    assert offences == []


@pytest.mark.parametrize(
    "module",
    [
        "prefixstore",
        "prefixstore.store",
        "prefixstore.ops",
        "prefixstore.ioproc",
        "prefixstore.cli.main",
    ],
)
def test_the_core_imports_no_engine(module: str) -> None:
    """Importing the core or the command line loads neither torch nor vLLM nor numpy."""
    probe = (
        f"import {module}, sys; print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=REPO
    ).stdout.strip()
    assert loaded == "[]"


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link of a Markdown file names a tracked file, or a directory of some."""
    there = {REPO / parent for path in tracked() for parent in (path, *path.parents)}
    offences = [
        f"{path}: {target}"
        for path in tracked(".md")
        for target in re.findall(r"\]\(([^)#\s]+)", (REPO / path).read_text())
        if "://" not in target and (REPO / path.parent / target).resolve() not in there
    ]
    assert offences == []


def test_tools_are_executable() -> None:
    """Every verb in tools/ is executable; the shell ones parse."""
    verbs = [path for path in tracked() if path.parts[0] in ("tools", ".ci") and not path.suffix]
    assert [str(path) for path in verbs if not (REPO / path).stat().st_mode & 0o100] == []
    for path in verbs:
        if "bash" in (REPO / path).read_text().partition("\n")[0]:
            subprocess.run(["bash", "-n", REPO / path], check=True)
