"""The next vLLM's own scheduler, connectors and CPU tier with our code, from its Python files alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.models import REPO

VERSIONS = ["0.33.0"]
FILES = ["test_tier_on_manager.py", "test_schedules.py", "test_direct_failures.py"]
TIMEOUT_S = 500


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with another vLLM in the place of the installed one, on this machine's CPU."""
    path = os.pathsep.join([str(tree), str(REPO)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_what_holds_with_this_vllm_holds_with_another(version: str, file: str) -> None:
    """Below its tiering manager, and in both roles of both modes under its scheduler, byte by byte."""
    tree = REPO / ".cache" / f"vllm-{version}"
    if not (tree / "vllm" / "version.py").is_file():
        pytest.skip(f"vLLM {version} is not unpacked here: run tools/next-vllm {version}")
    code = "import vllm, vllm.version as v; print(v.__version__, vllm.__file__)"
    assert [version, str(tree / "vllm" / "__init__.py")] == run(tree, "-c", code).stdout.split()
    done = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/vllm/{file}")

    assert 0 == done.returncode, done.stdout[-4000:]
    assert " passed" in done.stdout
