"""``pin``, ``unpin`` and ``pins`` as a user runs them."""

import errno
import time
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.keys import namespace_id
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain
from prefixstore.tree.osfs import Entry, RealOs
from tests.cli.conftest import Fill, Run
from tests.cli.engine_stub import EngineStub

NAMESPACE = namespace_id(FIELDS)
OTHER = namespace_id({**FIELDS, "dtype": "float16"})


def stems(root: str) -> set[str]:
    """Return the keys of the blobs under a root, in hex."""
    return {path.stem for path in Path(root).rglob("ns/**/*.kv")}


def test_a_pinned_prompt_outlives_an_eviction_of_everything(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """Its chunks stay, the others go, and unpinned they go with the next eviction."""
    fill("a", "b")
    engine.answers({NAMESPACE: [chain("a", 4)]})
    pinned = run("pin", root, "bot", "--prompts", "p.jsonl", "--model", "m", "--json")
    evict = ("gc", root, "--max-bytes", "0", "--yes")

    assert pinned.code == 0, pinned.err
    assert pinned.json["keys"] == pinned.json["stored_chunks"] == 4
    assert run(*evict).code == 1  # It says that what is pinned is above the limit.
    assert stems(root) == {key.hex() for key in chain("a", 4)}
    assert run("unpin", root, "bot").code == 0
    assert run(*evict).code == 0
    assert stems(root) == set()


def test_overlapping_pins_hold_what_the_other_lets_go(root: str, run: Run, fill: Fill) -> None:
    """Of two pins on one chain, removing the longer one frees only what the shorter does not hold."""
    fill("a")
    keys = chain("a", 10)
    run("pin", root, "long", "--key", keys[7].hex())
    run("pin", root, "short", "--key", keys[2].hex())
    lines = {line["name"]: line for line in run("pins", root, "--json").json}
    run("unpin", root, "long")
    run("gc", root, "--max-bytes", "0", "--yes")

    assert lines["long"]["stored_bytes"] == lines["short"]["stored_bytes"] == FILE_BYTES
    assert stems(root) == {key.hex() for key in keys[:3]}


def test_a_pin_of_a_namespace_says_when_it_is_not_of_all_of_it(
    root: str, run: Run, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be read is not kept, and what is only said to be kept goes."""
    fill("a")
    bad = str(next(Path(root).glob("ns/*/*/*/*.kv")).parent)
    scan = RealOs.scan

    def failing(calls: RealOs, path: str) -> list[Entry]:
        if path == bad:
            raise OSError(errno.EIO, "a bad disk")
        return scan(calls, path)

    monkeypatch.setattr(RealOs, "scan", failing)
    named = run("pin", root, "some", "--key", chain("a", 10)[0].hex(), "--namespace", NAMESPACE)
    done = run("pin", root, "all", "--namespace", NAMESPACE)

    assert (named.code, done.code) == (0, 1)
    assert "not everything was looked at" in done.err
    assert "Pinned 9 chunks" in done.out


def test_every_hosts_refcounts_follow_the_pin_files(
    root: str, run: Run, fill: Fill, tmp_path: Path
) -> None:
    """Another host's index counts a pin after its next scan, also after the index was lost."""
    fill("a")
    keys = chain("a", 10)
    config = StoreConfig(index_dir=str(tmp_path / "other-host"), direct_io="off")

    def pins_on_other_host() -> int:
        with PrefixStore.open(root, config=config, create=False, background=False) as store:
            store.reconcile()
            return store.hints.refs(NAMESPACE, keys[1]).pins

    seen = [pins_on_other_host()]
    run("pin", root, "one", "--namespace", NAMESPACE[:6])
    run("pin", root, "two", "--key", keys[1].hex())
    seen.append(pins_on_other_host())
    for path in (tmp_path / "other-host").rglob("*.mdb"):
        path.unlink()
    seen.append(pins_on_other_host())
    run("unpin", root, "one", "two")
    seen.append(pins_on_other_host())

    assert seen == [0, 2, 2, 0]


def test_a_pin_ends_by_itself(root: str, run: Run, fill: Fill) -> None:
    """After its end it holds nothing, and the list says so."""
    fill("a")
    key = chain("a", 10)[0].hex()
    long = run("pin", root, "long", "--key", key, "--for", "30d", "--json")
    run("pin", root, "past", "--key", key, "--until", "2001-01-31")
    listed = {line["name"]: line["holds"] for line in run("pins", root, "--json").json}

    assert 29 * 86400 < long.json["ends_at_s"] - time.time() < 31 * 86400
    assert listed == {"long": True, "past": False}
    assert "has ended" in run("pins", root).out


def test_a_prompt_can_be_pinned_before_it_is_stored(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """With its namespace named; without, the error says that it has to be."""
    fill("a")
    engine.answers({NAMESPACE: [chain("later", 3)]})
    words = ("pin", root, "later", "--prompts", "-", "--model", "m")
    unnamed, named = run(*words), run(*words, "--namespace", NAMESPACE, "--json")

    assert unnamed.code == 2
    assert "--namespace" in unnamed.err
    assert (named.json["keys"], named.json["stored_chunks"]) == (3, 0)


def test_a_prompt_in_two_namespaces_needs_a_choice(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """The error names both."""
    fill("a")
    fill("a", dtype="float16")
    engine.answers({NAMESPACE: [chain("a", 3)], OTHER: [chain("a", 3)]})
    outcome = run("pin", root, "x", "--prompts", "p.txt", "--model", "m")

    assert outcome.code == 2
    assert NAMESPACE in outcome.err
    assert OTHER in outcome.err


def test_the_engine_is_asked_with_what_the_command_line_says(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """File, model, template and the engine's own arguments reach it as they were given."""
    fill("a")
    engine.answers({NAMESPACE: [chain("a", 3)]})
    words = ("--prompts", "p.txt", "--model", "m", "--chat", "--chat-template", "t.jinja")
    run("pin", root, "x", *words, "--", "--tokenizer", "other")

    assert engine.request == {
        "root": root,
        "namespace": None,
        "prompts": "p.txt",
        "model": "m",
        "chat": True,
        "chat_template": "t.jinja",
        "arguments": ["--tokenizer", "other"],
    }


def test_mistakes_are_told(root: str, run: Run, fill: Fill, engine: EngineStub) -> None:
    """Nothing to pin, half of what prompts need, an unreadable date, a prompt without keys."""
    fill("a")
    engine.answers({NAMESPACE: [[]]}, error="too long")
    prompts = ("--prompts", "p.txt", "--model", "m")

    assert "Say what to pin" in run("pin", root, "x").err
    assert "go together" in run("pin", root, "x", "--prompts", "p.txt").err
    assert "2027-01-31" in run("pin", root, "x", "--namespace", "1", "--until", "soon").err
    assert "line 1: too long" in run("pin", root, "x", *prompts).err
    assert run("unpin", root, "absent").code == 1
    assert not list(Path(root, "pins").iterdir())


def test_an_engine_that_fails_has_the_last_word(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """Its exit code becomes the command's."""
    fill("a")
    engine.fails("vLLM is not installed here")
    outcome = run("pin", root, "x", "--prompts", "p.txt", "--model", "m")

    assert outcome.code == 2
    assert "could not be worked out" in outcome.err
