"""Stands in for the engine's child process: answers with the keys that a file beside it holds.

The command line starts `sys.executable -m MODULE REQUEST`; a test makes this script that executable. The
real child is tested with a real engine (`tests/vllm/test_prefill.py`).
"""

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from prefixstore.keys import Key

SCRIPT = """#!{python}
import json, sys
request = json.loads(sys.argv[3])
answer = json.load(open({answer!r}))
json.dump(request, open({answer!r} + ".request", "w"))
if request["prompts"] == "-":
    sys.stdin.read()
if "fail" in answer:
    sys.stderr.write(answer["fail"])
    sys.exit(2)
if request["namespace"] is not None:
    answer["namespaces"] = {{request["namespace"]: answer["namespaces"][request["namespace"]]}}
json.dump(answer, sys.stdout)
"""


class EngineStub:
    """What the child will answer, and what it was asked."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answer = directory / "answer.json"
        script = directory / "engine"
        script.write_text(SCRIPT.format(python=sys.executable, answer=str(self._answer)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))

    def answers(self, namespaces: dict[str, list[list[Key]]], *, error: str | None = None) -> None:
        """Let the child answer with these keys of prompts."""
        prompts = max(map(len, namespaces.values()))
        self._write(
            {
                "prompts": [
                    {"line": at + 1, "tokens": 200, "error": error} for at in range(prompts)
                ],
                "namespaces": {
                    name: [[key.hex() for key in keys] for keys in chains]
                    for name, chains in namespaces.items()
                },
                "unkeyed": {},
            }
        )

    def fails(self, message: str) -> None:
        """Let the child fail."""
        self._write({"fail": message})

    @property
    def request(self) -> dict[str, Any]:
        """What the child was asked last."""
        asked = json.loads(Path(f"{self._answer}.request").read_text())
        assert isinstance(asked, dict)
        return asked

    def _write(self, answer: dict[str, Any]) -> None:
        self._answer.write_text(json.dumps(answer))
