"""What one host stores of a model with windows another finds: our lookups above two real stores on one root."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore.keys import Key
from prefixstore.store import Chunk, PrefixStore
from prefixstore.vllm.lookups import Reach, RequestLookup

TOKENS = 16
CHUNKS = 512
INTERVAL = 64
WINDOW = 8
"""In chunks: a prompt of 8,192 tokens, windows of 128 kept every 1,024, as for gpt-oss."""
REACHES = {
    0: Reach(chunk_tokens=TOKENS),
    1: Reach(chunk_tokens=TOKENS, window_chunks=WINDOW, window_tokens=WINDOW * TOKENS - 1),
}


def key(number: int, group: int) -> Key:
    return Key(number.to_bytes(32, "big") + group.to_bytes(4, "big"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a root with what one host has stored of a prompt."""
    root = tmp_path_factory.mktemp("shared") / "root"
    with PrefixStore.open(str(root), namespace={"a": 1}, index=None) as writer:
        for group in (0, 1):
            parent = None
            for number in range(CHUNKS):
                if group == 0 or number % INTERVAL >= INTERVAL - WINDOW:
                    end = (number + 1) * TOKENS
                    chunk = Chunk(key=key(number, group), parent=parent, end_token=end)
                    writer.store(chunk, b"kv" * 32)
                    parent = chunk.key
    return root


@pytest.fixture
def other_host(root: Path) -> Iterator[PrefixStore]:
    """Give the store of a host that has seen nothing yet."""
    with PrefixStore.open(str(root), namespace={"a": 1}, index=None) as store:
        yield store


@pytest.mark.parametrize(("shared", "found"), [(512, 512), (312, 256), (70, 64), (40, 0)])
def test_another_host_hits_up_to_the_last_window_inside_what_is_shared(
    other_host: PrefixStore, shared: int, found: int
) -> None:
    """However long the prompt: the window nearest to the end is among what is looked for."""
    lookup = RequestLookup(REACHES)
    keys = [[key(i if i < shared else 1000 + i, group) for i in range(CHUNKS)] for group in (0, 1)]
    for group, order in ((0, range(CHUNKS)), (1, range(CHUNKS - 1, -1, -1))):
        for i in order:
            lookup.ask(keys[group][i], (i + 1) * TOKENS)

    while questions := lookup.take_questions():
        for question in questions:
            if question.chained:
                count = other_host.longest_prefix(question.keys)
                present = [at < count for at in range(len(question.keys))]
            else:
                present = other_host.contains(question.keys)
            lookup.take_verdict(question, present)

    wanted = lookup.wanted()
    assert found * TOKENS == lookup.saved_tokens(wanted)
    assert (found + WINDOW if found else 0) == len(wanted)
