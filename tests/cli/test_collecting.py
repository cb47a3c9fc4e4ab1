"""Limits, gc and stats as an operator uses them; ``gc --watch`` in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

from prefixstore.cli.main import cli
from prefixstore.errors import InvalidError
from prefixstore.index.memory_index import MemoryIndex
from prefixstore.keys import namespace_id
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, store_chain
from prefixstore.tree.lease import Lease
from tests.cli.conftest import Fill, Run

NAMESPACE = namespace_id(FIELDS)
PATIENCE_S = 30.0

Watch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Return a function that starts ``gc --watch`` on a root."""
    with ExitStack() as running:

        def start(root: str, *arguments: str) -> "subprocess.Popen[str]":
            command = [sys.executable, "-m", "prefixstore.cli", "gc", root, "--watch", *arguments]
            process = subprocess.Popen(
                [*command, "--interval", "0.1s"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            )
            running.callback(process.communicate)
            running.callback(process.kill)
            return process

        yield start


def blobs(root: str) -> int:
    """Count the blobs under a root."""
    return sum(1 for _ in Path(root).glob("ns/*/*/*/*.kv"))


def line_of(process: "subprocess.Popen[str]") -> str:
    """Return the next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline()


# limits


@pytest.mark.parametrize("made", [(), ("--group-shared",)])
def test_what_an_operator_writes_is_for_the_engines_to_read(
    tmp_path: Path, run: Run, made: tuple[str, ...]
) -> None:
    """Limits, pins and scans have the mode of the root's own document, whatever umask they are run with."""
    root = str(tmp_path / "shared")
    assert run("init", root, *made).code == 0
    keys = chain("a", 2)
    with PrefixStore.open(root, namespace=FIELDS, index=None) as store:
        store_chain(store, keys)
    before = os.umask(0o077)
    try:
        for verb in (
            ("limits", root, "--max-bytes", "1GiB", "--max-age", "1d"),
            ("pin", root, "bot", "--namespace", NAMESPACE, "--key", keys[1].hex()),
            ("gc", root, "--yes"),
            ("scrub", root),
        ):
            assert run(*verb).code == 0, verb
    finally:
        os.umask(before)
    documents = [path for path in Path(root).rglob("*.json") if path.parent.name != "writers"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in documents}
    assert {"store.json", "limits.json", "bot.json", "scan.json", "cursor.json"} <= modes.keys()
    assert set(modes.values()) == {0o660 if made else 0o644}


def test_limits_are_set_shown_and_lifted(root: str, run: Run, fill: Fill) -> None:
    """What is not named stays; 0 lifts one limit, --clear all."""
    fill("a")
    assert run("limits", root).out == "limits      none\n"
    run("limits", root, "--max-bytes", "10GiB", "--max-age", "7d")
    found = run("limits", root, "--namespace", f"{NAMESPACE[:6]}=1GiB", "--json").json
    assert found == {
        "format": 1,
        "max_bytes": 10 * 2**30,
        "min_free_bytes": 0,
        "max_age_s": 604800.0,
        "namespaces": {NAMESPACE: 2**30},
    }
    assert run("limits", root).out == (
        f"max size    10.0 GiB\nmax age     7d\n{NAMESPACE[:10]}  1.0 GiB\n"
    )
    run("limits", root, "--max-age", "0", "--namespace", f"{NAMESPACE}=0")
    assert run("limits", root).out == "max size    10.0 GiB\n"
    run("limits", root, "--clear")
    assert not (Path(root) / "limits.json").exists()


@pytest.mark.parametrize("arguments", [("--namespace", "zz=1GiB"), ("--namespace", NAMESPACE)])
def test_limits_of_no_namespace_are_refused(
    root: str, run: Run, fill: Fill, arguments: tuple[str, ...]
) -> None:
    """A namespace is one that the root has, and its limit has a size."""
    fill("a")
    assert run("limits", root, *arguments).code == 2
    assert not (Path(root) / "limits.json").exists()


def test_damaged_limits_are_set_anew(root: str, run: Run) -> None:
    """Showing and gc name the file; --clear needs not read it."""
    (Path(root) / "limits.json").write_text("{")
    outcomes = [run("limits", root), run("gc", root, "--yes")]
    assert [(each.code, "limits.json" in each.err) for each in outcomes] == [(2, True)] * 2
    assert run("limits", root, "--clear", "--max-bytes", "1GiB").code == 0
    assert run("limits", root).code == 0


# gc


def test_gc_goes_by_the_limits_of_the_root(root: str, run: Run, fill: Fill) -> None:
    """Without a size or an age, down to the low watermark."""
    fill("a", "b")
    assert run("gc", root, "--yes").code == 2
    run("limits", root, "--max-bytes", f"{20 * FILE_BYTES}")
    assert run("gc", root, "--yes").code == 0
    assert blobs(root) == 17


def test_a_dry_run_tells_what_would_go_and_why(root: str, run: Run, fill: Fill) -> None:
    """By namespace and reason, with the times of their last use."""
    fill("a", model="old")
    old = namespace_id({**FIELDS, "model": "old"})
    for path in Path(root).glob(f"ns/{old}/*/*/*.kv"):
        os.utime(path, (86400, 86400))
    fill("b")
    run("limits", root, "--namespace", f"{NAMESPACE}={5 * FILE_BYTES}", "--max-age", "30d")
    found = run("gc", root, "--dry-run", "--json").json
    groups = [(each["namespace"], each["reason"], each["chunks"]) for each in found["groups"]]
    assert groups == [(old, "age", 10), (NAMESPACE, "namespace", 6)]
    text = run("gc", root, "--dry-run").out
    assert f"{old}: 10 chunks, 120.0 KiB, too old, last used 1970-01-02 00:00Z to" in text
    assert "limit of the namespace" in text
    assert blobs(root) == 20


@pytest.fixture
def no_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a home on a network filesystem: no verb has an index on disk."""

    def refuse(_environment: object) -> Path:
        raise InvalidError("the cache directory is on NFS")

    monkeypatch.setattr("prefixstore.index.place.default_index_dir", refuse)


@pytest.mark.usefixtures("no_cache_directory")
def test_verbs_without_an_index_on_disk_have_room_for_the_root(
    root: str, run: Run, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read a root once; an engine's bound is none for them."""
    fill("a", "b", "c")
    monkeypatch.setitem(MemoryIndex.__init__.__kwdefaults__, "rows_max", 8)
    listed = run("gc", root, "--max-bytes", f"{10 * FILE_BYTES}B", "--yes")

    assert (listed.code, listed.err) == (0, "")
    assert blobs(root) == 10


@pytest.mark.usefixtures("no_cache_directory")
def test_gc_removes_what_it_can_plan_and_says_what_is_wrong(
    root: str, run: Run, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is sound as far as it goes is carried out; the exit code tells that it was not all."""
    fill("a", "b", "c")
    monkeypatch.setattr("prefixstore.store.opening.TOOL_ROWS_MAX", 16)
    done = run("gc", root, "--max-bytes", f"{25 * FILE_BYTES}B", "--yes")

    assert done.code == 1
    assert "--index-dir" in done.err
    assert blobs(root) == 25


def test_gc_removes_torn_files_before_chunks(root: str, run: Run, fill: Fill) -> None:
    """They take room that the sound ones could have."""
    fill("a", "b", "c")
    torn = sorted(Path(root).glob("ns/*/*/*/*.kv"))[:5]
    for path in torn:
        path.write_bytes(bytes(4000))
        os.utime(path, (1e9, 1e9))
    done = run("gc", root, "--max-bytes", f"{20 * FILE_BYTES}B", "--yes")

    assert done.code == 0
    assert not any(path.exists() for path in torn)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_keeps_to_the_limits_until_told_to_end(
    root: str, run: Run, fill: Fill, watch: Watch, number: signal.Signals
) -> None:
    """A line a pass; a limit set meanwhile is kept; a signal ends it with 0 and nothing on stderr."""
    fill("a", "b")
    process = watch(root, "--json")
    first = json.loads(line_of(process))
    assert (first["state"], first["report"]["evicted_chunks"]) == ("done", 0)
    run("limits", root, "--max-bytes", f"{10 * FILE_BYTES}")
    end_s = time.monotonic() + PATIENCE_S
    while json.loads(line_of(process))["report"]["evicted_chunks"] == 0:
        assert time.monotonic() < end_s
    assert blobs(root) == 8
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")


def test_watch_leaves_a_root_to_who_evicts_and_waits_for_one_that_is_away(
    root: str, run: Run, fill: Fill, watch: Watch
) -> None:
    """Neither ends it: each is a line, and the next pass is another try."""
    fill("a")
    away = Path(root).with_name("away")
    with PrefixStore.open(root, index=None) as store:
        lease = Lease(store.root, holder="b" * 32, clock=store._parts.clock)
        assert lease.acquire()
        process = watch(root)
        assert "left to another host" in line_of(process)
        lease.release()
    _until(process, "0 chunks went")
    Path(root).rename(away)
    _until(process, "failed: ")
    away.rename(root)
    _until(process, "0 chunks went")
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


def test_watch_of_what_is_no_store_ends(tmp_path: Path, run: Run) -> None:
    """A wrong path is a usage error at once; a dry run of something that stays makes no sense."""
    (tmp_path / "other").mkdir()
    assert run("gc", str(tmp_path / "other"), "--watch").code == 2
    assert run("gc", str(tmp_path / "other"), "--watch", "--dry-run").code == 2


def _until(process: "subprocess.Popen[str]", text: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while text not in line_of(process):
        assert time.monotonic() < end_s


DEPLOYING = (Path(__file__).resolve().parents[2] / "docs" / "deploying.md").read_text()
COMMANDS = re.findall(r"ExecStart=\S+/(prefixstore .*)", DEPLOYING)
COMMANDS += [
    line.replace(",", "") for line in re.findall(r"command: \[(prefixstore.*)\]", DEPLOYING)
]
COMMANDS += [
    each.strip() for each in re.findall(r'prefixstore [^"&]*', *re.findall(r"args: .*", DEPLOYING))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_lines_of_the_manifests_are_understood(line: str) -> None:
    """Every verb and option in the unit and the manifest is one of ours."""
    _, verb, *arguments = line.split()
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.make_context(verb, arguments).params["root"] == "/mnt/kv"


def test_all_command_lines_of_the_manifests_are_looked_at() -> None:
    """The unit's, the engine's, those of the collector's container, its job, and the two before it."""
    assert [line.split()[1] for line in COMMANDS] == ["gc", "serve", "gc", "gc", "init", "limits"]


# stats


def test_stats_tell_limits_collector_writers_and_ages(root: str, run: Run, fill: Fill) -> None:
    """What an operator asks first, as text and as JSON."""
    text = run("stats", root).out
    assert "limits      none in the root" in text
    assert "collector   nobody has evicted yet, no scan known" in text
    fill("a", "b")
    run("limits", root, "--max-bytes", f"{40 * FILE_BYTES}")
    with PrefixStore.open(root, index=None) as store:
        store._parts.membership.announce()
        lease = Lease(store.root, holder=store.tree.writer, clock=store._parts.clock)
        assert lease.acquire()
        found = run("stats", root, "--json").json
        text = run("stats", root).out
    collector = found["collector"]
    assert (collector["epoch"], collector["active"]) == (1, True)
    assert collector["holder"] == found["seen"][0]["writer"]
    assert (found["writers"], found["seen"][0]["pid"]) == (1, os.getpid())
    assert found["limits"]["max_bytes"] == 40 * FILE_BYTES
    assert 0 < found["namespaces"][0]["oldest_s"] <= found["namespaces"][0]["used_s"]
    assert "limits      max size 480.0 KiB, used 50.0%" in text
    assert "evicts, last seen" in text
    lease.release()
    run("gc", root, "--yes")
    assert "at rest after eviction 1, last scan 20" in run("stats", root).out
