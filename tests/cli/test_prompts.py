"""``ls --prompt``, the filters of ``ls``, and ``rm --prompts`` and ``--pin``, as a user runs them."""

from pathlib import Path

from prefixstore.blob.reasons import MissReason
from prefixstore.config import StoreConfig
from prefixstore.keys import namespace_id
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, chunk_at, payload_of
from prefixstore.tree.quarantine import Quarantine
from tests.cli.conftest import Fill, Run
from tests.cli.engine_stub import EngineStub

NAMESPACE = namespace_id(FIELDS)
OTHER = namespace_id({**FIELDS, "dtype": "float16"})
PROMPTS = ("--prompts", "p.jsonl", "--model", "m")


def stems(root: str) -> set[str]:
    """Return the keys of the blobs under a root, in hex."""
    return {path.stem for path in Path(root).rglob("ns/**/*.kv")}


def store_prompt(root: str, keys: list) -> None:
    """Store the chunks of one prompt, given as a chain."""
    config = StoreConfig(direct_io="off")
    with PrefixStore.open(root, namespace=FIELDS, config=config, index=None) as store:
        for at, key in enumerate(keys):
            store.store(chunk_at(keys, at), payload_of(key))


# ls


def test_ls_tells_which_chunks_of_a_prompt_are_stored(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """A prompt whose end was never stored, in one namespace and not in the other."""
    fill("a")
    fill("b", dtype="float16")
    prompt = [*chain("a", 10), *chain("never", 2)]
    engine.answers({NAMESPACE: [prompt], OTHER: [prompt]})
    outcome = run("ls", root, "--prompts", "p.txt", "--model", "m", "--json")

    assert outcome.code == 0, outcome.err
    (held,) = outcome.json
    assert held["namespace"] == NAMESPACE
    assert (held["chunks"], held["stored_chunks"], held["prefix_tokens"]) == (12, 10, 160)
    assert held["stored_bytes"] == 10 * FILE_BYTES
    assert held["stored_keys"] == [key.hex() for key in chain("a", 10)]


def test_ls_says_of_a_bad_prompt_what_is_wrong(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """The other prompts are told of all the same."""
    fill("a")
    engine.answers({NAMESPACE: [[]]}, error="longer than the context")
    outcome = run("ls", root, "--prompts", "p.txt", "--model", "m")

    assert "longer than the context" in outcome.out


def test_ls_filters_chunks(root: str, run: Run, fill: Fill) -> None:
    """By depth, size, age and pin, over all namespaces or in one."""
    fill("a", pin="kept")
    fill("b", dtype="float16")

    def count(*filters: str) -> int:
        outcome = run("ls", root, *filters, "--json")
        assert outcome.code == 0, outcome.err
        return len(outcome.json)

    assert count("--min-tokens", "1") == 20
    assert count("--min-tokens", "49", "--max-tokens", "80") == 4
    assert count("--min-tokens", "49", "--max-tokens", "80", "--namespace", OTHER) == 2
    assert count("--pin", "kept") == 3
    assert count("--older-than", "1h") == 0
    assert count("--newer-than", "1h") == 20
    assert count("--max-size", "4096") == 0
    assert count("--min-size", "4096") == 20
    assert "... 18 more" in run("ls", root, "--min-tokens", "1", "--limit", "2").out
    assert run("ls", root, "--pin", "absent").code == 2


# rm


def test_rm_erases_a_prompt_with_what_was_computed_from_it(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """An answer that follows it goes as well, in every namespace; another prompt stays."""
    fill("a", "b")
    fill("a", dtype="float16")
    engine.answers({NAMESPACE: [chain("a", 6)], OTHER: [chain("a", 6)]})
    outcome = run("rm", root, *PROMPTS, "--yes")

    assert outcome.code == 0, outcome.err
    assert stems(root) == {key.hex() for key in chain("b", 10)}
    assert "20 chunks" in outcome.out
    assert "Archives" in outcome.out


def test_rm_leaves_what_another_prompt_begins_with(root: str, run: Run, engine: EngineStub) -> None:
    """Two prompts with one system prompt: one goes, the system prompt stays for the other."""
    system, mine, yours = chain("system", 3), chain("mine", 2), chain("yours", 2)
    store_prompt(root, [*system, *mine])
    store_prompt(root, [*system, *yours])
    engine.answers({NAMESPACE: [[*system, *mine]]})
    plan = run("rm", root, *PROMPTS, "--dry-run", "--json")
    run("rm", root, *PROMPTS, "--yes")

    assert (plan.json["planned_chunks"], plan.json["shared_chunks"]) == (2, 3)
    assert stems(root) == {key.hex() for key in (*system, *yours)}
    run("rm", root, *PROMPTS, "--shared", "--yes")
    assert stems(root) == set()


def test_rm_takes_a_shared_beginning_with_the_last_prompt_that_has_it(
    root: str, run: Run, engine: EngineStub
) -> None:
    """Both prompts named, nothing is left; a prompt that is only stored in part goes, too."""
    system, mine, yours = chain("system", 3), chain("mine", 2), chain("yours", 2)
    store_prompt(root, [*system, *mine])
    store_prompt(root, [*system, yours[0]])
    engine.answers({NAMESPACE: [[*system, *mine], [*system, *yours]]})
    run("rm", root, *PROMPTS, "--yes")

    assert stems(root) == set()


def test_rm_spares_prompts_behind_a_prompt_of_which_only_their_beginning_is_stored(
    root: str, run: Run, engine: EngineStub
) -> None:
    """What follows the last stored chunk of an unfinished prompt belongs to others."""
    system, mine, yours = chain("system", 3), chain("mine", 2), chain("yours", 2)
    store_prompt(root, [*system, *yours])
    engine.answers({NAMESPACE: [[*system, *mine]]})
    outcome = run("rm", root, *PROMPTS, "--yes")

    assert outcome.code == 0
    assert stems(root) == {key.hex() for key in (*system, *yours)}


def test_rm_by_prompt_keeps_what_a_pin_needs(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """And says how many chunks that are."""
    fill("a", pin="kept")
    engine.answers({NAMESPACE: [chain("a", 10)]})
    outcome = run("rm", root, *PROMPTS, "--yes")

    assert "3 chunks that pins need" in outcome.out
    assert stems(root) == {key.hex() for key in chain("a", 3)}


def test_rm_by_pin_removes_pin_and_chunks_but_not_another_pins(
    root: str, run: Run, fill: Fill
) -> None:
    """What both hold stays for the other; what follows the pinned chunks goes with them."""
    fill("a", "b", pin="one")
    run("pin", root, "two", "--key", chain("a", 10)[1].hex())
    outcome = run("rm", root, "--pin", "one", "--yes")

    assert outcome.code == 0, outcome.err
    assert [line["name"] for line in run("pins", root, "--json").json] == ["two"]
    assert stems(root) == {key.hex() for key in (*chain("a", 2), *chain("b", 10))}
    assert run("rm", root, "--pin", "one").code == 2


def test_rm_erases_damaged_copies_too(root: str, run: Run, fill: Fill, engine: EngineStub) -> None:
    """A chunk of the prompt in quarantine still holds what can be read of it."""
    fill("a", "b")
    config = StoreConfig(direct_io="off")
    with PrefixStore.open(root, namespace=FIELDS, config=config, index=None) as store:
        quarantine = Quarantine(store.root, bytes_max=2**30)
        for name in ("a", "b"):
            key = chain(name, 10)[9]
            Path(store.root.layout.blob(NAMESPACE, key)).write_bytes(b"damaged")
            assert quarantine.take(NAMESPACE, key, MissReason.TORN)
    engine.answers({NAMESPACE: [chain("a", 10)]})
    outcome = run("rm", root, *PROMPTS, "--yes")

    assert outcome.code == 0, outcome.err
    (left,) = Path(root, "quarantine").iterdir()
    assert chain("b", 10)[9].hex() in left.name


def test_rm_asks_before_it_erases_prompts(
    root: str, run: Run, fill: Fill, engine: EngineStub
) -> None:
    """A no changes nothing; prompts from stdin leave nobody to ask."""
    fill("a")
    engine.answers({NAMESPACE: [chain("a", 10)]})
    refused = run("rm", root, *PROMPTS, answer="n\n")
    unasked = run("rm", root, "--prompts", "-", "--model", "m")

    assert refused.code == 1
    assert unasked.code == 2
    assert len(stems(root)) == 10


def test_rm_takes_one_way_of_naming(root: str, run: Run, fill: Fill) -> None:
    """Mixtures that mean nothing are usage errors."""
    fill("a")
    mixtures = (
        ("--pin", "x", "--older-than", "1d"),
        ("--pin", "x", "--namespace", NAMESPACE),
        ("--shared", "--namespace", NAMESPACE),
        (*PROMPTS, "--key", "00" * 12),
    )

    assert [run("rm", root, *words, "--yes").code for words in mixtures] == [2] * 4
    assert len(stems(root)) == 10
