"""The pure parts of prefill: files of prompts, the order of work, the loop around an engine."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId
from prefixstore.ops.claims import NUMBERS_MAX, Claims
from prefixstore.testing.chains import chain
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.root import Root
from prefixstore.vllm.offline.driver import Computed, Driver, Progress
from prefixstore.vllm.offline.keying import Keying
from prefixstore.vllm.offline.promptfile import Prompt, read_prompts
from prefixstore.vllm.offline.work import Seen, Work

NAMESPACE = NamespaceId("ab" * 16)
CHUNK = 16


def one(line: str, *, chat: bool = False, name: str = "p.jsonl") -> Prompt:
    """Read a file of one line."""
    (prompt,) = read_prompts([line], name=name, chat=chat)
    return prompt


# Files of prompts.


def test_every_form_of_a_prompt_is_read() -> None:
    """Text, tokens and chats, named or bare."""
    messages = [{"role": "user", "content": "hi"}]
    read = [
        one('{"prompt": "once", "max_tokens": 5, "temperature": 0.5, "stream": true}'),
        one('{"custom_id": "7", "method": "POST", "url": "/v1/x", "body": {"prompt": "once"}}'),
        one('"once"'),
        one('{"prompt": [1, 2]}'),
        one("[1, 2]"),
        one('{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": false}'),
        one('[{"role": "user", "content": "hi"}]'),
        one('{"prompt": "hi"}', chat=True),
        one("once\n", name="p.txt"),
    ]

    assert read == [
        *[Prompt(line=1, text="once")] * 3,
        Prompt(line=1, tokens=(1, 2)),
        Prompt(line=1, tokens=(1, 2)),
        Prompt(line=1, messages=messages, rendering={"add_generation_prompt": False}),
        Prompt(line=1, messages=messages),
        Prompt(line=1, messages=messages),
        Prompt(line=1, text="once"),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "x", "cache_salt": "s"}', "cache_salt"),
        ('{"prompt": "x", "lora": "a"}', "lora"),
        ('{"prompt": "x", "truncate_prompt_tokens": 9}', "truncate_prompt_tokens"),
        ('{"body": {"prompt": "x", "cache_salt": "s"}}', "cache_salt"),
        ('{"body": {"prompt": "x"}, "cache_salt": "s"}', "cache_salt"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "pictures"),
        ('{"prompt": 5}', "neither"),
        ('{"prompt": [1, true]}', "neither"),
        ("[]", "neither"),
        ("{broken", "malformed"),
    ],
)
def test_what_would_change_a_key_is_refused_by_line(line: str, word: str) -> None:
    """The other prompts are read all the same."""
    good, bad = read_prompts(['"good"', line], name="p.jsonl", chat=False)

    assert good.error is None
    assert bad.line == 2
    assert word in str(bad.error)


def test_text_and_json_are_told_apart() -> None:
    """By the name, or by the first line that is not blank; blank lines are no prompts."""
    as_text = read_prompts(["", "tell me\n", '"x"\n'], name="-", chat=False)
    as_json = read_prompts(["\n", '{"prompt": "x"}\n'], name="-", chat=False)

    assert [prompt.text for prompt in as_text] == ["tell me", '"x"']
    assert [(prompt.line, prompt.text) for prompt in as_json] == [(2, "x")]
    with pytest.raises(InvalidError, match="no prompt"):
        read_prompts(["", " "], name="-", chat=False)


# How a namespace makes keys.


def test_a_manifest_that_does_not_tell_is_refused() -> None:
    """As that of a bare tier, whose users name the namespace."""
    with pytest.raises(InvalidError, match="does not tell"):
        Keying.of_fields({"explicit": "mine", "groups": [{"id": 0}]})


def test_needed_chunks_are_those_that_the_engine_stores() -> None:
    """All of full attention, the last of a window, none of a state beside them."""
    keying = Keying(
        "sha256", "0", 16, (16,) * 3, ("FullAttentionSpec", "SlidingWindowSpec", "MambaSpec")
    )
    full, window, state = chain("full", 3), chain("window", 3), chain("state", 3)

    assert keying.needed([full, window, state]) == [*full, window[-1]]
    assert Keying("sha256", "0", 16, (16,), ("MambaSpec",)).needed([state]) == [state[-1]]


# The loop.


class Shelf:
    """A root in memory that counts how often each chunk was computed."""

    def __init__(self) -> None:
        self.chunks: dict[Key, int] = {}
        self.computed: dict[Key, int] = {}
        self.lock = threading.Lock()


class ToyEngine:
    """Computes a prompt in two steps, and stores it in the step after the next."""

    def __init__(self, shelf: Shelf, clock: ManualClock, *, stores: bool = True) -> None:
        self._shelf = shelf
        self._clock = clock
        self._stores = stores
        self._queued: list[tuple[str, Sequence[int]]] = []
        self._finished: list[Sequence[int]] = []
        self.most_at_once = 0

    def add(self, request: str, tokens: Sequence[int]) -> None:
        """Queue a prompt; one that begins with 666 is refused."""
        if tokens[0] == 666:
            raise ValueError("too long")
        self._queued.append((request, tokens))
        self.most_at_once = max(self.most_at_once, len(self._queued))

    def step(self) -> list[Computed]:
        """Store what was computed, compute what was queued."""
        self.nudge()
        self._clock.advance(0.1)
        done, self._queued = self._queued, []
        for _, tokens in done:
            with self._shelf.lock:
                for key in keys_of(tokens):
                    if key not in self._shelf.chunks:
                        self._shelf.computed[key] = self._shelf.computed.get(key, 0) + 1
            self._finished.append(tokens)
        return [Computed(request=name, tokens=len(t), cached_tokens=0) for name, t in done]

    def nudge(self) -> None:
        """Store what was computed."""
        with self._shelf.lock:
            for tokens in self._finished if self._stores else ():
                self._shelf.chunks.update(dict.fromkeys(keys_of(tokens), 4096))
        self._finished = []


def keys_of(tokens: Sequence[int]) -> list[Key]:
    """Return keys that chain over the tokens, a chunk each."""
    ends = range(CHUNK, len(tokens) + 1, CHUNK)
    return [chain(str(tuple(tokens[:end])), 1)[0] for end in ends]


def work_of(*prompts: Sequence[int]) -> list[Work]:
    """Return the work of prompts, ordered as a plan is."""
    return [
        Work(
            lines=[line],
            tokens=tuple(tokens),
            needed=tuple(keys_of(tokens)),
            keys=tuple(keys_of(tokens)),
        )
        for line, tokens in enumerate(sorted(prompts), 1)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Return a new root, for claims."""
    return Root.create(str(tmp_path / "root"))


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    """Return an empty shelf."""
    return Shelf()


def drive(
    root: Root,
    shelf: Shelf,
    work: list[Work],
    *,
    slots: int = 1000,
    stores: bool = True,
    watch: Callable[[Progress], None] = lambda _progress: None,
) -> tuple[Progress, ToyEngine]:
    """Run a driver to its end."""
    clock = ManualClock()
    engine = ToyEngine(shelf, clock, stores=stores)
    with Claims(root, NAMESPACE) as claims:
        driver = Driver(
            engine,
            Seen(shelf.chunks.get),
            claims,
            slots=slots,
            store_reason=lambda: "the store is full",
            watch=watch,
            clock=clock,
        )
        driver.run(work)
    return driver.progress, engine


SYSTEM = list(range(40))
FAMILY = [[*SYSTEM, *range(100 * each, 100 * each + 40)] for each in range(1, 7)]


def test_a_shared_beginning_is_computed_once(root: Root, shelf: Shelf) -> None:
    """One prompt goes first, the others follow together."""
    progress, engine = drive(root, shelf, work_of(*FAMILY))

    assert set(shelf.computed.values()) == {1}
    assert engine.most_at_once == 5
    assert progress.done_prompts == progress.prompts == 6
    assert progress.stored_chunks == len(shelf.chunks) == len(shelf.computed)
    assert progress.stored_bytes == 4096 * len(shelf.chunks)


def test_what_is_stored_is_not_computed(root: Root, shelf: Shelf) -> None:
    """A second run gives the engine nothing."""
    drive(root, shelf, work_of(*FAMILY))
    again = work_of(*FAMILY)
    progress, engine = drive(root, shelf, again)

    assert engine.most_at_once == 0
    assert progress.done_prompts == 6
    assert not any(work.was_computed for work in again)


def test_no_more_is_begun_than_the_cpu_tier_stages(root: Root, shelf: Shelf) -> None:
    """Half the slots; a prompt that is larger than all goes alone."""
    apart = [list(range(1000 * each, 1000 * each + 32)) for each in range(1, 9)]
    _, some = drive(root, shelf, work_of(*apart), slots=8)
    _, alone = drive(root, Shelf(), work_of(*apart), slots=1)

    assert some.most_at_once == 2
    assert alone.most_at_once == 1


def test_a_store_that_stores_nothing_ends_with_an_error(root: Root, shelf: Shelf) -> None:
    """After some attempts, with the store's reason; the others' errors do not wait for it for ever."""
    work = work_of(*FAMILY[:2])
    progress, _ = drive(root, shelf, work, stores=False)

    assert progress.done_prompts == 2
    assert [work[0].error, work[1].error] == ["computed, but not stored: the store is full"] * 2


def test_a_prompt_that_the_engine_refuses_costs_no_other(root: Root, shelf: Shelf) -> None:
    """It has its error, and its claim is let go."""
    work = work_of([666] * 32, *FAMILY)
    progress, _ = drive(root, shelf, work)

    errors = [each.error for each in work if each.error]
    assert errors == ["the engine does not take it: too long"]
    assert progress.done_prompts == 7


def test_processes_share_the_work(root: Root, shelf: Shelf) -> None:
    """Three at once on one list: every chunk is computed once, and all of them see the end of it."""
    prompts = [*FAMILY, *([*FAMILY[0], *range(at, at + 32)] for at in range(2000, 2400, 40))]
    results: list[Progress] = []
    threads = [
        threading.Thread(target=lambda: results.append(drive(root, shelf, work_of(*prompts))[0]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [progress.done_prompts for progress in results] == [16] * 3
    assert set(shelf.computed.values()) == {1}
    assert sum(progress.stored_chunks for progress in results) == len(shelf.chunks)


def test_a_prompt_whose_chunks_are_coming_is_left_to_who_computes_it(
    root: Root, shelf: Shelf
) -> None:
    """Another process has computed it, and its chunks come one after the other."""
    (work,) = work_of(FAMILY[0])
    coming = list(work.needed)
    with Claims(root, NAMESPACE) as other:
        assert other.acquire(coming[0])
        assert other.acquire(coming[-1])

        def store_next(_: Progress) -> None:
            if coming:
                shelf.chunks[coming.pop(0)] = 4096
            if not coming:
                other.close()

        shelf.chunks[coming.pop(0)] = 4096
        progress, _ = drive(root, shelf, [work], watch=store_next)

    assert shelf.computed == {}
    assert (progress.stored_chunks, progress.done_prompts) == (0, 1)


def test_a_prompt_of_a_dead_process_is_taken_over(root: Root, shelf: Shelf) -> None:
    """A claim whose claimant is gone does not hold anybody up."""
    dead = Claims(root, NAMESPACE)
    work = work_of(*FAMILY)
    assert dead.acquire(work[0].needed[0])
    Path(root.layout.prefill, f"{dead.claimant}.json").unlink()
    progress, _ = drive(root, shelf, work)

    assert progress.done_prompts == 6
    assert set(itertools.chain(*(each.needed for each in work))) == set(shelf.chunks)


def test_a_prompt_that_kills_engines_fails_at_last(root: Root, shelf: Shelf) -> None:
    """After a hundred dead claimants it is not tried again, and the others are done."""
    work = work_of(*FAMILY[:1], [7] * 32)
    directory = Path(root.layout.prefill, NAMESPACE)
    directory.mkdir(parents=True)
    for number in range(NUMBERS_MAX):
        claim = directory / f"{work[1].needed[0].hex()}.{number}.json"
        claim.write_text('{"claimant": "dead"}')
    progress, _ = drive(root, shelf, work)

    assert progress.done_prompts == 2
    assert work[0].error is None
    assert "died on this prompt" in str(work[1].error)
