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
    links_to,
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


def turn_second_link(model: Path) -> None:
    """Turn a link that another link on the path leads to."""
    stable = model.parent / "releases" / "stable"
    stable.unlink()
    stable.symlink_to("../prepared")


def turn_links_directory(model: Path) -> None:
    """Turn a link to the directory in which a weight file's own link leads to it."""
    current = model.parent / "current"
    current.unlink()
    current.symlink_to("prepared")


def rename_files_directory(model: Path) -> None:
    """Exchange the directory in which a weight file's own link leads to it."""
    (model.parent / "blobs").rename(model.parent / "old")
    (model.parent / "prepared").rename(model.parent / "blobs")


@pytest.mark.parametrize(
    ("name", "replace"),
    [
        ("model", replace_file),
        ("model", replace_directory),
        ("link", turn_link),
        ("production", turn_second_link),
        ("linked", turn_links_directory),
        ("blobbed", rename_files_directory),
    ],
    ids=[
        "a file",
        "the directory",
        "a link",
        "a link behind a link",
        "a link behind a file's link",
        "the directory behind a file's link",
    ],
)
def test_what_changed_since_the_process_began_is_refused(
    model: Path, name: str, replace: object
) -> None:
    """Times of content say nothing: they can be set, and move with what is renamed."""
    prepared, releases = model.parent / "prepared", model.parent / "releases"
    for directory in (prepared, releases, model.parent / "blobs"):
        directory.mkdir()
    (prepared / "model.safetensors").write_bytes(b"prepared")
    (model.parent / "link").symlink_to(model)
    (model.parent / "production").symlink_to(releases / "stable")
    (releases / "stable").symlink_to("../model")
    (model.parent / "current").symlink_to("model")
    (model.parent / "blobs" / "model.safetensors").write_bytes(b"blob")
    for linked, behind in (("linked", "current"), ("blobbed", "blobs")):
        (model.parent / linked).mkdir()
        link = model.parent / linked / "model.safetensors"
        link.symlink_to(f"../{behind}/model.safetensors")
    time.sleep(0.05)  # The kernel's clock for files ticks every few milliseconds.
    began_s = time.time()
    time.sleep(0.05)
    source = WeightSource(model=str(model.parent / name), loaded_since_s=began_s)
    identify_weights(source, digests=WeightDigests(None))
    assert callable(replace)
    replace(model)

    with pytest.raises(InvalidError, match="changed after this engine's process began"):
        identify_weights(source, digests=WeightDigests(None))


def test_links_are_followed_as_the_kernel_does(tmp_path: Path) -> None:
    """Relative and absolute ones, through directories that are links, and back up; no more than it would."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to("../absolute/b/..")
    (tmp_path / "start").symlink_to("a/up/b")
    path = tmp_path / "start" / ".." / "b" / "file"

    links = [link for link in links_to(path) if link.is_relative_to(tmp_path)]

    assert path.resolve() == tmp_path / "a" / "b" / "file"
    assert [tmp_path / "start", tmp_path / "a" / "up", tmp_path / "absolute"] == links
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidError, match="more than 40 symbolic links"):
        links_to(tmp_path / "loop" / "file")


def test_files_that_say_how_to_read_weights_are_part_of_them(model: Path) -> None:
    """Which files are read, and how they are quantised: vLLM looks for such names by their ends."""
    source = WeightSource(model=str(model), loaded_since_s=LATER_S)
    said = {
        "consolidated.safetensors.index.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
    }
    for name in (*said, "config.json", "tokenizer.json"):
        (model / name).write_text("{}")

    found = identify_weights(source, digests=WeightDigests(None))["files"]

    assert isinstance(found, dict)
    assert {"model.safetensors", *said} == found.keys()


def test_weights_in_directories_count_where_a_model_reads_them(model: Path) -> None:
    """Each by its way from the model's directory, through links too; other models' directories do not."""
    other = model.parent / "other"
    for directory in (model / "transformer", model / "vision_encoder", other):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(directory.name.encode())
    (model / "linked").symlink_to(other)
    found = {}
    for reads_folders in (False, True):
        source = WeightSource(model=str(model), loaded_since_s=LATER_S, reads_folders=reads_folders)
        found[reads_folders] = identify_weights(source, digests=WeightDigests(None))["files"]

    assert isinstance(found[True], dict)
    assert {"model.safetensors"} == set(found[False])
    inside = {"linked", "transformer", "vision_encoder"}
    assert {"model.safetensors", *(f"{name}/model.safetensors" for name in inside)} == set(
        found[True]
    )


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


def test_a_link_to_a_snapshot_that_was_turned_is_refused(tmp_path: Path) -> None:
    """Its commit is what the link says now; the engine may have loaded another."""
    snapshots = tmp_path / "models--org--name" / "snapshots"
    for commit in (COMMIT, OTHER_COMMIT):
        (snapshots / commit).mkdir(parents=True)
    link = tmp_path / "stable"
    link.symlink_to(snapshots / COMMIT)
    time.sleep(0.05)
    source = WeightSource(model=str(link), loaded_since_s=time.time())
    assert COMMIT == identify_weights(source, digests=WeightDigests(None))["commit"]
    time.sleep(0.05)
    link.unlink()
    link.symlink_to(snapshots / OTHER_COMMIT)

    with pytest.raises(InvalidError, match="stable changed after this engine's process began"):
        identify_weights(source, digests=WeightDigests(None))


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
