"""Every verb as a user runs it: what it prints, what it leaves behind, how it ends."""

import json
import os
from pathlib import Path

import pytest

from prefixstore.keys import namespace_id
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain
from tests.cli.conftest import Fill, Run

NAMESPACE = namespace_id(FIELDS)


def blobs(root: str) -> list[Path]:
    """Return every blob file under a root."""
    return sorted(Path(root).rglob("ns/**/*.kv"))


# init


def test_init_makes_a_store_and_keeps_one(tmp_path: Path, run: Run) -> None:
    """A second init changes nothing and names the same store."""
    path = str(tmp_path / "new")
    first, second = run("init", path, "--json"), run("init", path, "--json")

    assert (first.code, second.code) == (0, 0)
    assert first.json == second.json
    assert first.json["root"] == path
    assert "is a store" in run("init", path).out


def test_init_refuses_a_directory_of_something_else(tmp_path: Path, run: Run) -> None:
    """The error names what was found, what was expected and what to do."""
    (tmp_path / "thesis.txt").touch()
    outcome = run("init", str(tmp_path))

    assert outcome.code == 2
    assert all(word in outcome.err for word in ("thesis.txt", "store.json", "empty"))


def test_init_group_shared_sets_the_group_bit(tmp_path: Path, run: Run) -> None:
    """Directories hand their group on."""
    run("init", str(tmp_path / "new"), "--group-shared")

    assert (tmp_path / "new" / "ns").stat().st_mode & 0o2070 == 0o2070


# stats


def test_stats_counts_what_is_there(root: str, run: Run, fill: Fill) -> None:
    """Chunks and bytes are those of the tree, by namespace."""
    fill("a", "b")
    fill("a", dtype="float16")
    outcome = run("stats", root, "--json")

    assert outcome.code == 0
    assert (outcome.json["chunks"], outcome.json["file_bytes"]) == (30, 30 * FILE_BYTES)
    assert [line["chunks"] for line in outcome.json["namespaces"]] == [20, 10]
    text = run("stats", root).out
    assert NAMESPACE in text
    assert "66.7%" in text


def test_stats_tells_damage_and_pins(root: str, run: Run, fill: Fill) -> None:
    """Torn files, quarantine and pins are part of the picture."""
    fill("a", pin="prompt")
    blobs(root)[0].write_bytes(b"")
    found = run("stats", root, "--json").json

    assert (found["chunks"], found["torn_files"], found["pins"]) == (9, 1, {"prompt": 3})
    assert "torn files" in run("stats", root).out


def test_stats_of_what_is_no_store_is_refused(tmp_path: Path, run: Run) -> None:
    """A wrong path, a directory of another kind: each says what to do."""
    missing = run("stats", str(tmp_path / "nowhere"))
    other = run("stats", str(tmp_path))

    assert (missing.code, other.code) == (1, 2)
    assert "mounted" in missing.err
    assert "prefixstore init" in other.err


# ls


def test_ls_lists_namespaces(root: str, run: Run, fill: Fill) -> None:
    """With their fields, so that people know which is which."""
    fill("a")
    fill("a", model="other")
    text = run("ls", root).out

    assert "model=tiny" in text
    assert "model=other" in text
    assert [line["chunks"] for line in run("ls", root, "--json").json] == [10, 10]


def test_ls_lists_chunks_up_to_a_limit(root: str, run: Run, fill: Fill) -> None:
    """Chunks come with depth, size and refcounts, and the rest is counted."""
    fill("a", pin="prompt")
    text = run("ls", root, "--namespace", NAMESPACE[:6], "--limit", "4").out
    lines = run("ls", root, "--namespace", NAMESPACE, "--json").json

    assert "... 6 more" in text
    assert {line["end_token"] for line in lines} == {16 * (at + 1) for at in range(10)}
    assert {line["key"] for line in lines} == {key.hex() for key in chain("a", 10)}
    assert sorted(line["pins"] for line in lines) == [0] * 7 + [1] * 3
    assert sorted(line["children"] for line in lines) == [0] + [1] * 9


def test_ls_of_an_unknown_namespace_names_the_known(root: str, run: Run, fill: Fill) -> None:
    """The error lists what there is."""
    fill("a")
    outcome = run("ls", root, "--namespace", "zz")

    assert outcome.code == 2
    assert NAMESPACE in outcome.err


# verify


def test_verify_passes_a_sound_root(root: str, run: Run, fill: Fill) -> None:
    """All blobs are read and the exit code is 0."""
    fill("a")
    outcome = run("verify", root)

    assert (outcome.code, outcome.out) == (0, "10 blobs, 120.0 KiB checked: all sound\n")


def test_verify_names_every_damaged_blob(root: str, run: Run, fill: Fill) -> None:
    """A flipped bit and a short file are found, told by path, and the exit code is 1."""
    fill("a")
    flipped, short = blobs(root)[2], blobs(root)[7]
    content = bytearray(flipped.read_bytes())
    content[6000] ^= 4
    flipped.write_bytes(content)
    os.truncate(short, 5000)
    outcome = run("verify", root)

    assert outcome.code == 1
    assert str(flipped) in outcome.out
    assert str(short) in outcome.out
    assert "1 digest, 1 torn" in outcome.out
    assert run("verify", root, "--json").json["reasons"] == {"digest": 1, "torn": 1}


def test_verify_quarantines_when_told_so(root: str, run: Run, fill: Fill) -> None:
    """Damaged blobs move aside, and the next run is clean."""
    fill("a")
    blobs(root)[0].write_bytes(b"x" * 8192)
    assert "moved to quarantine" in run("verify", root, "--quarantine").out

    assert run("verify", root).code == 0
    assert len(blobs(root)) == 9
    assert run("stats", root, "--json").json["quarantine_files"] == 1


def test_verify_samples_by_lot(root: str, run: Run, fill: Fill) -> None:
    """A share of the blobs, the same for the same seed."""
    fill("a", "b", "c", "d")
    one = run("verify", root, "--sample", "0.5", "--seed", "7", "--json").json
    again = run("verify", root, "--sample", "0.5", "--seed", "7", "--json").json

    assert one == again
    assert 5 < one["checked_chunks"] < 35
    assert one["checked_chunks"] + one["skipped_chunks"] == 40
    assert run("verify", root, "--sample", "1.5").code == 2


def test_verify_checks_one_namespace(root: str, run: Run, fill: Fill) -> None:
    """Other namespaces are left alone."""
    fill("a")
    fill("a", "b", model="other")

    assert "10 blobs" in run("verify", root, "--namespace", NAMESPACE).out


def test_verify_reads_manifests(root: str, run: Run, fill: Fill) -> None:
    """A manifest that was changed by hand is a finding."""
    fill("a")
    path = Path(root) / "ns" / NAMESPACE / "manifest.json"
    path.write_text(json.dumps({"fields": {"model": "another"}}))
    outcome = run("verify", root)

    assert outcome.code == 1
    assert "manifest: its fields belong to namespace" in outcome.out


# gc


def test_gc_shows_a_plan_and_asks(root: str, run: Run, fill: Fill) -> None:
    """No is no; yes evicts down to the size."""
    fill("a")
    refused = run("gc", root, "--max-bytes", "60KiB", answer="n\n")
    assert (refused.code, len(blobs(root))) == (1, 10)
    assert "To remove: 5 chunks" in refused.out
    assert "nothing was changed" in refused.err

    agreed = run("gc", root, "--max-bytes", "60KiB", answer="y\n")
    assert (agreed.code, len(blobs(root))) == (0, 5)
    assert "Removed 5 chunks" in agreed.out


def test_gc_dry_run_changes_nothing(root: str, run: Run, fill: Fill) -> None:
    """It tells what would go, also to scripts."""
    fill("a")
    plan = run("gc", root, "--max-bytes", "0", "--dry-run", "--json").json

    assert (plan["planned_chunks"], plan["left_chunks"], plan["dry_run"]) == (10, 0, True)
    assert len(blobs(root)) == 10


def test_gc_without_anyone_to_ask_changes_nothing(root: str, run: Run, fill: Fill) -> None:
    """A script that forgot --yes does no harm."""
    fill("a")

    assert run("gc", root, "--max-bytes", "0").code == 2
    assert len(blobs(root)) == 10
    done = run("gc", root, "--max-bytes", "0", "--yes", "--json")
    assert (done.code, done.json["evicted_chunks"]) == (0, 10)


def test_gc_by_age_keeps_the_young(root: str, run: Run, fill: Fill) -> None:
    """Blobs that nobody touched for a week go."""
    fill("old", "new")
    for key in chain("old", 10):
        path = next(path for path in blobs(root) if path.stem == key.hex())
        os.utime(path, (1, 1))
    run("gc", root, "--max-age", "7d", "--yes")

    assert {path.stem for path in blobs(root)} == {key.hex() for key in chain("new", 10)}


def test_gc_that_cannot_reach_its_limit_says_so(root: str, run: Run, fill: Fill) -> None:
    """Pins stay, and the exit code tells scripts that the root is too large."""
    fill("a", pin="prompt")
    outcome = run("gc", root, "--max-bytes", "0", "--yes")

    assert (outcome.code, len(blobs(root))) == (1, 3)
    assert "above the limit" in outcome.err


def test_gc_with_nothing_to_do_says_so(root: str, run: Run, fill: Fill) -> None:
    """No question is asked."""
    fill("a")
    outcome = run("gc", root, "--max-bytes", "1GiB")

    assert outcome.code == 0
    assert "Nothing to remove" in outcome.out


@pytest.mark.parametrize(
    "arguments", [(), ("--max-bytes", "ten"), ("--max-age", "old"), ("--max-bites", "1")]
)
def test_gc_with_a_wrong_command_line_explains(
    root: str, run: Run, arguments: tuple[str, ...]
) -> None:
    """Usage errors end with 2 and name the option."""
    outcome = run("gc", root, *arguments)

    assert outcome.code == 2
    assert "--" in outcome.err


# rm


def test_rm_empties_a_namespace(root: str, run: Run, fill: Fill) -> None:
    """No chunk of it stays, the others stay whole, and it can be used again."""
    fill("a")
    fill("a", model="other")
    outcome = run("rm", root, "--namespace", NAMESPACE[:8], "--yes")

    assert outcome.code == 0
    assert len(blobs(root)) == 10
    assert NAMESPACE not in str(blobs(root))
    fill("a")
    assert run("verify", root).code == 0


def test_rm_keeps_what_pins_need(root: str, run: Run, fill: Fill) -> None:
    """Pinned chunks stay with their ancestors, and so does the namespace."""
    fill("a", "b", pin="prompt")
    outcome = run("rm", root, "--namespace", NAMESPACE, "--yes")

    assert "3 chunks that pins need" in outcome.out
    assert len(blobs(root)) == 3


def test_rm_removes_a_chunk_with_all_that_follow(root: str, run: Run, fill: Fill) -> None:
    """What could not be reached any more does not stay."""
    fill("a")
    keys = chain("a", 10)
    asked = run("rm", root, "--key", keys[6].hex(), answer="y\n")

    assert asked.code == 0
    assert "To remove: 4 chunks" in asked.out
    assert {path.stem for path in blobs(root)} == {key.hex() for key in keys[:6]}


def test_rm_names_unknown_keys(root: str, run: Run, fill: Fill) -> None:
    """A key that is nowhere is a failure, a key that is no key a usage error."""
    fill("a")
    unknown = run("rm", root, "--key", chain("b", 1)[0].hex(), "--yes")

    assert unknown.code == 1
    assert "no such chunk" in unknown.err
    assert run("rm", root, "--key", "xyz", "--yes").code == 2


def test_rm_older_than_is_gc_by_age(root: str, run: Run, fill: Fill) -> None:
    """Over the whole root, and only alone."""
    fill("a")
    for path in blobs(root):
        os.utime(path, (1, 1))

    assert run("rm", root, "--older-than", "1d", "--namespace", NAMESPACE).code == 2
    dry = run("rm", root, "--older-than", "1d", "--dry-run", "--json").json
    assert [plan["planned_chunks"] for plan in dry] == [10]
    assert run("rm", root, "--older-than", "1d", "--yes").code == 0
    assert blobs(root) == []


def test_rm_needs_to_be_told_what(root: str, run: Run) -> None:
    """Removing everything is not offered."""
    assert run("rm", root, "--yes").code == 2


# All verbs


def test_verbs_work_beside_an_open_store(root: str, run: Run, fill: Fill) -> None:
    """An engine may have the root open, with the same index."""
    fill("a")
    with PrefixStore.open(root, namespace=FIELDS, index=None) as store:
        assert run("gc", root, "--max-bytes", "0", "--yes").code == 0
        assert store.load(chain("a", 1)[0], bytearray(6000), raw_bytes=6000).reason == "absent"


def test_relative_paths_and_homes_are_understood(
    root: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roots are named as shells name them."""
    monkeypatch.chdir(Path(root).parent)
    monkeypatch.setenv("HOME", str(Path(root).parent))

    assert run("stats", "root").code == 0
    assert run("stats", "~/root").code == 0


def test_a_cache_directory_that_cannot_hold_an_index_is_no_obstacle(
    root: str, run: Run, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a place for an index the verbs read the tree."""
    fill("a")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    assert run("stats", root, "--json").json["chunks"] == 10
    Path(root).with_name("file").write_text("")
    assert run("stats", root, "--index-dir", str(Path(root).with_name("file"))).code == 0
