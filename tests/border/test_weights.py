"""Who weights are: by content, by commit, and by nothing that could be either."""

import importlib.util
import os
import time
from pathlib import Path

import msgspec
import pytest

from prefixstore.errors import InvalidError
from prefixstore.vllm.weights import (
    WeightDigests,
    WeightSource,
    identify_weights,
    process_start_s,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = COMMIT[::-1]
LATER_S = float("inf")
NEEDS_HUB = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="the hub's client comes with vLLM"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Give a directory with weights of a day ago."""
    directory = tmp_path / "model"
    directory.mkdir()
    weights = directory / "model.safetensors"
    weights.write_bytes(b"weights")
    day_ago = time.time() - 86400
    os.utime(weights, (day_ago, day_ago))
    return directory


def hub(cache: Path, *, branch: str, commit: str) -> str:
    """Write what a hub's cache knows of a branch."""
    refs = cache / "models--org--name" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / branch).write_text(commit)
    return str(cache)


def test_content_names_weights_and_code_only_where_it_runs(model: Path) -> None:
    """Other files of the directory do not matter; code does once it is trusted."""
    source = WeightSource(model=str(model), loaded_since_s=LATER_S)
    trusted = WeightSource(model=str(model), loaded_since_s=LATER_S, runs_code=True)
    before = identify_weights(source, digests=WeightDigests(None))
    (model / "README.md").write_text("other")
    (model / "modeling.py").write_text("code")

    assert before == identify_weights(source, digests=WeightDigests(None))
    found = identify_weights(trusted, digests=WeightDigests(None))["files"]
    assert isinstance(found, dict)
    assert {"model.safetensors", "modeling.py"} == found.keys()


def test_digests_are_remembered_and_full_reads_all_the_same(model: Path, tmp_path: Path) -> None:
    """A lie in the memory shows who believes it; a new size, time or inode is never found there."""
    memory = tmp_path / "weights.json"
    weights = model / "model.safetensors"
    stat = weights.stat()
    identity = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    memory.write_bytes(msgspec.json.encode({identity: "remembered"}))

    assert "remembered" == WeightDigests(memory).digest(weights)
    read = WeightDigests(memory, full=True).digest(weights)
    assert 32 == len(read)
    os.utime(weights, (1, 1))
    assert read == WeightDigests(memory).digest(weights)


def test_a_fresh_file_is_read_again(model: Path, tmp_path: Path) -> None:
    """Within its times' granularity a file may change once more and look the same."""
    memory = tmp_path / "weights.json"
    WeightDigests(memory).digest(model / "model.safetensors")

    assert not memory.exists()


@pytest.mark.parametrize("junk", [b"", b"{", b"[1]", b'{"a": 1}'])
def test_a_damaged_memory_is_forgotten(model: Path, tmp_path: Path, junk: bytes) -> None:
    """The digest is then taken from the file."""
    memory = tmp_path / "weights.json"
    memory.write_bytes(junk)

    expected = WeightDigests(None).digest(model / "model.safetensors")
    assert expected == WeightDigests(memory).digest(model / "model.safetensors")


def replace_file(model: Path) -> None:
    """Rename another file into the weights' place, with the old one's times."""
    weights, new = model / "model.safetensors", model.parent / "new"
    new.write_bytes(b"WEIGHTS")
    os.utime(new, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
    new.rename(weights)


def replace_directory(model: Path) -> None:
    """Exchange the directory by one that was made before."""
    model.rename(model.parent / "old")
    (model.parent / "prepared").rename(model)


def turn_link(model: Path) -> None:
    """Turn a link on the path to a directory that was made before."""
    link = model.parent / "link"
    link.unlink()
    link.symlink_to(model.parent / "prepared")


@pytest.mark.parametrize(
    ("name", "replace"),
    [("model", replace_file), ("model", replace_directory), ("link", turn_link)],
    ids=["a file", "the directory", "a link"],
)
def test_what_changed_since_the_process_began_is_refused(
    model: Path, name: str, replace: object
) -> None:
    """Times of content say nothing: they can be set, and move with what is renamed."""
    prepared = model.parent / "prepared"
    prepared.mkdir()
    (prepared / "model.safetensors").write_bytes(b"prepared")
    (model.parent / "link").symlink_to(model)
    time.sleep(0.05)  # The kernel's clock for files ticks every few milliseconds.
    began_s = time.time()
    time.sleep(0.05)
    source = WeightSource(model=str(model.parent / name), loaded_since_s=began_s)
    identify_weights(source, digests=WeightDigests(None))
    assert callable(replace)
    replace(model)

    with pytest.raises(InvalidError, match="changed after this engine's process began"):
        identify_weights(source, digests=WeightDigests(None))


def test_the_process_began_before_now() -> None:
    """And not long ago: this is a test."""
    assert time.time() - 86400 < process_start_s() < time.time()


@NEEDS_HUB
def test_a_snapshot_is_its_commit_by_path_or_by_name(tmp_path: Path) -> None:
    """The same snapshot has one name, whichever way the user wrote it."""
    cache = hub(tmp_path, branch="main", commit=COMMIT)
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    sources = [
        WeightSource(model=str(snapshot), loaded_since_s=0),
        WeightSource(model="org/name", revision=COMMIT, loaded_since_s=0),
        WeightSource(model="org/name", config_commit=COMMIT, hub_cache=cache, loaded_since_s=0),
    ]
    expected = {"repository": "org/name", "commit": COMMIT}

    assert [expected] * 3 == [identify_weights(s, digests=WeightDigests(None)) for s in sources]


@NEEDS_HUB
@pytest.mark.parametrize(
    ("revision", "config_commit"),
    [(None, OTHER_COMMIT), (None, None), ("absent", COMMIT), ("../../escape", COMMIT)],
    ids=["moved", "config of no commit", "unknown branch", "no branch at all"],
)
def test_a_branch_that_may_have_moved_is_refused(
    tmp_path: Path, revision: str | None, config_commit: str | None
) -> None:
    """Config and weights are read at different times; unless one commit served both, nobody knows."""
    source = WeightSource(
        model="org/name",
        revision=revision,
        config_commit=config_commit,
        hub_cache=hub(tmp_path, branch="main", commit=COMMIT),
        loaded_since_s=0,
    )

    with pytest.raises(InvalidError, match="--revision with a full commit"):
        identify_weights(source, digests=WeightDigests(None))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    """The weights are then elsewhere, and unknown."""
    with pytest.raises(InvalidError, match="holds no weights"):
        identify_weights(
            WeightSource(model=str(tmp_path), loaded_since_s=0), digests=WeightDigests(None)
        )
