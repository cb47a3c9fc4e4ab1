"""An import that is killed in the middle has published whole chunks only, and is finished by another."""

import os
import subprocess
import sys
from pathlib import Path

from prefixstore.config import StoreConfig
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, load, payload_of
from tests.cli.conftest import Fill, Run

PATIENCE_S = 60


def blobs(root: str) -> dict[str, bytes]:
    """Return every blob by its path in the root."""
    paths = Path(root).glob("ns/*/*/*/*.kv")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_a_killed_import_is_finished_by_the_next(
    root: str, tmp_path: Path, run: Run, fill: Fill
) -> None:
    """From one root, through a kill in the middle of the stream, to another that loads every chunk."""
    fill("a", "b")
    archive, target = tmp_path / "kv.pfx", str(tmp_path / "target")
    assert run("export", "--root", root, str(archive)).code == 0
    assert run("init", target).code == 0
    content = archive.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-m", "prefixstore.cli", "import", "--root", target, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(content[: len(content) // 2])
        process.stdin.flush()
        while len(blobs(target)) < 5:
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)
    arrived = blobs(target)
    assert 5 <= len(arrived) < 20
    assert arrived.items() <= blobs(root).items()

    found = run("import", "--root", target, str(archive), "--json")
    assert (found.code, found.json["existed"]) == (0, len(arrived))
    assert blobs(target) == blobs(root)
    config = StoreConfig(direct_io="off")
    with PrefixStore.open(target, namespace=FIELDS, config=config, index=None) as store:
        for key in (*chain("a", 10), *chain("b", 10)):
            assert load(store, key) == payload_of(key)
