"""The next vLLM's own tiering manager and CPU tier above our tier, from its Python files alone."""

import os
import subprocess
import sys

import pytest

from tests.vllm.models import REPO

VERSIONS = ["0.33.0"]
TIMEOUT_S = 240


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tier_works_below_another_versions_manager(version: str) -> None:
    """All that is asked of the tier below the installed vLLM holds below this one."""
    tree = REPO / ".cache" / f"vllm-{version}"
    if not (tree / "vllm" / "version.py").is_file():
        pytest.skip(f"vLLM {version} is not unpacked here: run tools/next-vllm {version}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            "tests/vllm/test_tier_on_manager.py",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(REPO)])},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert 0 == done.returncode, done.stdout[-4000:]
    assert " passed" in done.stdout
