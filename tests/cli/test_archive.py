"""Export and import as people run them: files, parts, pipes, and what can be wrong with each."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.ops.volumes import VolumeReader, VolumeWriter, volumes_of
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, store_chain
from prefixstore.tree.osfs import Entry, RealOs
from tests.cli.conftest import Run as RunHere

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
KEYS = chain("a", 6)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return a root with a chain."""
    path = f"{tmp_path}/root"
    with PrefixStore.open(path, namespace=FIELDS, index=None, background=False) as store:
        store_chain(store, KEYS)
    return path


@pytest.fixture
def target(tmp_path: Path) -> str:
    """Return an empty root."""
    path = f"{tmp_path}/target"
    with PrefixStore.open(path, index=None):
        return path


@pytest.fixture
def prefixstore(tmp_path: Path) -> Run:
    """Return a function that runs the command in a process of its own."""

    def run(*words: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [sys.executable, "-m", "prefixstore.cli", *words],
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
            env={**os.environ, "XDG_CACHE_HOME": f"{tmp_path}/cache"},
        )

    return run


def blobs(root: str) -> dict[str, bytes]:
    """Return every blob by its path in the root."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in Path(root).glob("ns/*/*/*/*.kv")
    }


def test_through_a_file(root: str, target: str, tmp_path: Path, prefixstore: Run) -> None:
    """Exported, proved, imported: the same blobs, and exit code 0 each time."""
    file = f"{tmp_path}/kv.pfx"
    outcomes = [
        prefixstore("export", "--root", root, file),
        prefixstore("import", "--root", target, file, "--check"),
        prefixstore("import", "--root", target, file, "--pin", "shipped"),
        prefixstore("pins", target, "--json"),
    ]

    assert [outcome.returncode for outcome in outcomes] == [0] * 4, outcomes
    assert b"6 chunks imported" in outcomes[2].stdout
    assert b"shipped" in outcomes[3].stdout
    assert blobs(target) == blobs(root)


def test_through_a_pipe(root: str, target: str, prefixstore: Run) -> None:
    """The archive alone is on stdout; stdin is read once."""
    archive = prefixstore("export", "--root", root, "-")
    arrived = prefixstore("import", "--root", target, "-", stdin=archive.stdout)

    assert (archive.returncode, arrived.returncode) == (0, 0)
    assert b"6 chunks" in archive.stderr
    assert blobs(target) == blobs(root)


def test_through_parts(root: str, target: str, tmp_path: Path, prefixstore: Run) -> None:
    """No part exceeds its size; the import is given the archive's name or its first part's."""
    file = Path(tmp_path, "kv.pfx")
    outcome = prefixstore("export", "--root", root, str(file), "--split", "20kB")
    parts = sorted(tmp_path.glob("kv.pfx.*"))
    arrived = prefixstore("import", "--root", target, f"{file}.001")

    assert (outcome.returncode, arrived.returncode) == (0, 0)
    assert len(parts) == 4
    assert [part.stat().st_size for part in parts[:-1]] == [20_000] * 3
    assert not file.exists()
    assert blobs(target) == blobs(root)


def test_chosen_by_keys_from_a_list(root: str, tmp_path: Path, prefixstore: Run) -> None:
    """Keys in hex on stdin; one that is nowhere is told, with exit code 1."""
    file = f"{tmp_path}/kv.pfx"
    lines = f"{KEYS[2].hex()} 48 12288\n\n{chain('nowhere', 1)[0].hex()}\n"
    outcome = prefixstore("export", "--root", root, file, "--keys", "-", stdin=lines.encode())

    assert outcome.returncode == 1
    assert b"3 chunks" in outcome.stdout
    assert chain("nowhere", 1)[0].hex().encode() in outcome.stderr


def test_what_is_wrong_is_told_and_nothing_is_left(
    root: str, target: str, tmp_path: Path, prefixstore: Run
) -> None:
    """A pin that is not there, an archive that is none, a root that is none, a place that refuses."""
    file = Path(tmp_path, "kv.pfx")
    no_pin = prefixstore("export", "--root", root, str(file), "--pin", "nowhere")
    file.write_bytes(b"no archive" * 100)
    no_archive = prefixstore("import", "--root", target, str(file))
    no_file = prefixstore("import", "--root", target, f"{tmp_path}/missing")
    prefixstore("export", "--root", root, str(file))
    no_root = prefixstore("import", "--root", f"{tmp_path}/typo", str(file))
    no_place = prefixstore("export", "--root", root, "/proc/kv.pfx")
    outcomes = [no_pin, no_archive, no_file, no_root, no_place]

    assert [outcome.returncode for outcome in outcomes] == [2, 2, 2, 1, 1], outcomes
    assert b"no pin 'nowhere'" in no_pin.stderr
    assert b"not a whole archive" in no_archive.stderr
    assert b"name an archive" in no_file.stderr
    assert not Path(tmp_path, "typo").exists()
    assert [b"Traceback" in outcome.stderr for outcome in outcomes] == [False] * 5
    assert blobs(target) == {}


def test_an_export_that_could_not_look_everywhere_says_so(
    root: str, tmp_path: Path, run: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be read is written, and a script hears that it is not all."""
    bad = str(next(Path(root).glob("ns/*/*/*/*.kv")).parent)
    scan = RealOs.scan

    def failing(calls: RealOs, path: str) -> list[Entry]:
        if path == bad:
            raise OSError(errno.EIO, "a bad disk")
        return scan(calls, path)

    monkeypatch.setattr(RealOs, "scan", failing)
    done = run("export", "--root", root, f"{tmp_path}/kv.pfx")

    assert done.code == 1
    assert f"not everything was looked at: [Errno {errno.EIO}]" in done.err
    assert f"{len(KEYS) - 1} chunks" in done.out


def test_an_export_that_fails_leaves_no_file(tmp_path: Path) -> None:
    """Neither under the archive's name nor under a temporary one; an older archive stays."""
    path = tmp_path / "kv.pfx"
    path.write_bytes(b"older")

    def fail() -> None:
        with VolumeWriter(path, split_bytes=None) as out:
            out.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert [each.name for each in tmp_path.iterdir()] == ["kv.pfx"]
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("split", [None, 1, 7, 100, 1000])
def test_parts_are_the_stream(tmp_path: Path, split: int | None) -> None:
    """Whatever the size of the parts and of the pieces written, reading gives what was written."""
    path = tmp_path / "kv.pfx"
    written = bytes(range(200))
    with VolumeWriter(path, split_bytes=split) as out:
        for at in range(0, len(written), 37):
            out.write(written[at : at + 37])
    with io.BufferedReader(VolumeReader(volumes_of(path))) as stream:
        assert stream.read() == written
