"""``prefixstore ns``: what tells namespaces apart, and how two of them differ."""

from pathlib import Path
from typing import Any

import pytest

from prefixstore.keys import NamespaceId, namespace_id
from prefixstore.tree.root import Root
from tests.cli.conftest import Run

ENGINE: dict[str, Any] = {
    "scheme": 2,
    "engine": "vllm 0.32",
    "architecture": "LlamaForCausalLM",
    "weights": {"files": {"model.safetensors": "0123456789abcdef" * 2}},
    "model_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "dtype": "torch.float32",
    "kv_cache_dtype": "torch.float32",
    "groups": [{"kind": "FullAttentionSpec", "layers": [f"layer.{i}" for i in range(40)]}],
    "topology": {"tensor": 1, "world": 1},
}
STRETCHED = {
    **ENGINE,
    "model_config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


def make(root: str, fields: dict[str, Any]) -> NamespaceId:
    """Make a namespace as an engine does at its start."""
    return Root.open(root).namespace(fields, create=True)


def test_ls_shows_what_tells_namespaces_apart(root: str, run: Run) -> None:
    """One line each, with the model, its weights and types, the workers and the engine."""
    hub = {**ENGINE, "weights": {"repository": "org/name", "commit": "fedcba98" * 5}}
    bare = {"explicit": "mine", "kv_dtype": "torch.float16", "world_size": 2}
    for fields in (ENGINE, hub, bare):
        make(root, fields)
    outcome = run("ns", "ls", root)
    lines = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()}

    assert 0 == outcome.code
    engine = ["float32", "float32", "1", "vllm", "0.32"]
    assert ["LlamaForCausalLM", "01234567", *engine] == lines[namespace_id(ENGINE)]
    assert ["LlamaForCausalLM", "org/name@fedcba98", *engine] == lines[namespace_id(hub)]
    assert ["mine", "-", "float16", "-", "2", "-"] == lines[namespace_id(bare)]
    (found,) = [line for line in run("ns", "ls", root, "--json").json if line["model"] == "mine"]
    assert bare == found["fields"]


def test_diff_shows_only_the_fields_that_differ(root: str, run: Run) -> None:
    """By their paths, with both values; beginnings of the ids are enough."""
    one, other = make(root, ENGINE), make(root, STRETCHED)
    outcome = run("ns", "diff", root, one[:6], other[:6])

    assert [
        ["field", one[:8], other[:8]],
        ["model_config.rope_parameters.factor", "(not", "there)", "4.0"],
        ["model_config.rope_parameters.rope_type", '"default"', '"linear"'],
    ] == [line.split() for line in outcome.out.splitlines()[:-1]]
    assert "2 of 13 fields differ" in outcome.out.splitlines()[-1]


def test_diff_in_json_gives_values_whole(root: str, run: Run) -> None:
    """Also long ones, of which the table shows the place where they part."""
    longer = {**ENGINE, "groups": [{**ENGINE["groups"][0], "layers": ["layer.0"] * 40}]}
    one, other = make(root, ENGINE), make(root, longer)
    found = run("ns", "diff", root, one, other, "--json").json
    text = run("ns", "diff", root, one, other).out

    assert (one, other) == (found["one"], found["other"])
    (difference,) = found["fields"]
    assert "groups[0].layers" == difference["field"]
    assert 40 == len(difference["one"]) == len(difference["other"])
    assert "layer.1" in text
    assert max(map(len, text.splitlines())) < 140


def test_diff_of_one_namespace_finds_it_the_same(root: str, run: Run) -> None:
    """And ``--all`` shows what agrees."""
    one = make(root, ENGINE)
    outcome = run("ns", "diff", root, one, one, "--all")

    assert 0 == outcome.code
    assert "All 12 fields agree" in outcome.out
    assert "topology.world" in outcome.out


def test_equal_numbers_of_different_kinds_differ(root: str, run: Run) -> None:
    """1, 1.0 and true are different JSON, and so are the namespaces."""
    one, other = make(root, {"a": 1, "b": [0]}), make(root, {"a": 1.0, "b": [False]})

    assert ["a", "b"] == [
        each["field"] for each in run("ns", "diff", root, one, other, "--json").json["fields"]
    ]


@pytest.mark.parametrize("name", ["0", "zz"], ids=["several", "none"])
def test_an_id_that_is_not_one_namespace_is_refused(root: str, run: Run, name: str) -> None:
    """The message names those that there are."""
    known = [make(root, {"number": number}) for number in range(64)]
    outcome = run("ns", "diff", root, name, known[0])

    assert 2 == outcome.code
    assert any(namespace in outcome.err for namespace in known)


def test_a_damaged_manifest_is_named_and_the_rest_listed(root: str, run: Run) -> None:
    """The list goes on; its exit code says that something is wrong."""
    one, other = make(root, ENGINE), make(root, STRETCHED)
    (Path(root) / "ns" / other / "manifest.json").write_text("{")
    outcome = run("ns", "ls", root)

    assert 1 == outcome.code
    assert one in outcome.out
    assert f"{other}/manifest.json" in outcome.err


def test_a_missing_manifest_is_named(root: str, run: Run) -> None:
    """No engine can open such a namespace; the message says how to be rid of it."""
    one, other = make(root, ENGINE), make(root, STRETCHED)
    (Path(root) / "ns" / other / "manifest.json").unlink()
    outcome = run("ns", "diff", root, one, other)

    assert 2 == outcome.code
    assert "prefixstore rm" in outcome.err
