"""Roots and a way to run the command line as a user does, without a process for each."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefixstore.cli import main as cli_main
from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, store_chain
from tests.cli.engine_stub import EngineStub


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout."""
        return json.loads(self.out)


Run = Callable[..., Outcome]
Fill = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs ``prefixstore`` with arguments and an answer on stdin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run_it(*arguments: str, answer: str = "") -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli_main.run(list(arguments))
        return Outcome(code, out.getvalue(), err.getvalue())

    return run_it


@pytest.fixture
def root(tmp_path: Path, run: Run) -> str:
    """Return the path of a new store."""
    path = str(tmp_path / "root")
    assert run("init", path).code == 0
    return path


@pytest.fixture
def fill(root: str) -> Fill:
    """Return a function that stores chains of ten chunks, by name, in a namespace."""

    def fill_it(*names: str, pin: str | None = None, **fields: object) -> None:
        config = StoreConfig(direct_io="off")
        namespace = {**FIELDS, **fields}
        with PrefixStore.open(root, namespace=namespace, config=config, index=None) as store:
            for name in names:
                store_chain(store, chain(name, 10))
            if pin is not None:
                store.pin(pin, chain(names[0], 3))

    return fill_it


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStub:
    """Return what stands in for the engine's child process."""
    return EngineStub(tmp_path, monkeypatch)
