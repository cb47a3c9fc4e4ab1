"""The code in the documents runs, and says what the documents say."""

import re
from pathlib import Path

import pytest

from prefixstore.blob.reasons import MissReason
from prefixstore.config import StoreConfig
from prefixstore.index.limits import gallop
from prefixstore.store import SkipReason, presence, transfers

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIBRARY = (DOCS / "library.md").read_text(encoding="utf-8")
OPERATING = (DOCS / "operating.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_examples_run(tmp_path: Path, code: str) -> None:
    """Each example runs as it stands, on directories of the test's own."""
    code = code.replace('"/mnt/kv"', repr(str(tmp_path / "kv")))
    code = code.replace('"/var/cache/prefixstore"', repr(str(tmp_path / "index")))
    exec(compile(code, "library.md", "exec"), {})


def test_the_first_example_is_short() -> None:
    """Fifteen lines or so tell what it is about."""
    lines = [line for line in EXAMPLES[0].splitlines() if line and "import" not in line]

    assert len(lines) <= 15


def test_every_reason_is_told() -> None:
    """Reasons are metric labels: each stands in the document, but for the deadline's, which is ioproc's."""
    reasons = {*MissReason, *SkipReason} - {MissReason.TIMEOUT}

    assert [reason for reason in reasons if f"`{reason}`" not in LIBRARY] == []


def test_every_setting_is_told() -> None:
    """An operator finds each option of a store."""
    assert [name for name in StoreConfig.__struct_fields__ if f"`{name}`" not in OPERATING] == []


def test_the_limits_are_as_told() -> None:
    """Figures in the documents are those in the code."""
    assert f"at most {presence.PROBES_MAX} stats" in LIBRARY
    assert f"at most {transfers.QUARANTINES_MAX} in ten minutes" in LIBRARY
    asked: list[int] = []
    gallop(4096, lambda at: asked.append(at) or at < 4000)
    assert len(asked) <= 2 * 12 + 2
