"""What to answer vLLM's lookups: pure state machines, no I/O, no clock.

vLLM's scheduler asks for one key after the other, in every step until all answers are final, and each
HIT at once takes a slot of the CPU tier (vllm/v1/kv_offload/tiering/manager.py, ``lookup``). So for each
request:

1. every key is answered RETRY until the store has said which of them it has;
2. from those the **match** is worked out: for a group asked front to back, the run of present keys from
   the first; for a group asked back to front (a sliding window or a state), the present keys within
   the match of the other groups;
3. the match is admitted when the CPU tier has room for it beside the matches of other requests; it is
   cut when it would not fit an empty tier;
4. each key of the match is answered HIT once; every other question is answered MISS.

Rule 4 is what ends a prefix longer than the CPU tier: a chunk that was promoted and evicted before use
is not promoted again for the same request, which would go on for ever. All promotions of a request
together are no more than the tier has slots, so that its later chunks do not turn out its first ones.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from prefixstore.keys import Key, kv_group

__all__ = ["Answer", "Budget", "Chains", "Question", "RequestLookup", "match"]


class Answer(Enum):
    """What the scheduler is told about one key."""

    MISS = auto()
    HIT = auto()
    RETRY = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The keys of one group to ask the store about, in the order of the prompt if ``chained``."""

    group: int
    keys: tuple[Key, ...]
    chained: bool


@dataclass(slots=True)
class _Group:
    """The keys of one KV group in the order the scheduler asked, each with its end token."""

    ends: dict[Key, int] = field(default_factory=dict)
    present: set[Key] = field(default_factory=set)

    @property
    def chained(self) -> bool:
        """Whether the scheduler scans this group from the front, as it does for full attention."""
        ends = list(self.ends.values())
        return len(ends) < 2 or ends[0] < ends[-1]  # noqa: PLR2004 - two ends make a direction


class RequestLookup:
    """The lookups of one request. Not thread-safe."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._unasked: list[Key] = []
        self._outstanding = 0
        self._match: list[Key] = []
        self._decided = False
        self._admitted: set[Key] = set()
        self._answered: set[Key] = set()

    def ask(self, key: Key, end_token: int) -> Answer:
        """Answer the scheduler's question for one key."""
        group = self._groups.setdefault(kv_group(key), _Group())
        if key not in group.ends:
            group.ends[key] = end_token
            self._unasked.append(key)
            self._decided = False
            return Answer.RETRY
        if not self._decided:
            return Answer.RETRY
        if key in self._admitted and key not in self._answered:
            self._answered.add(key)
            return Answer.HIT
        return Answer.MISS

    def take_questions(self) -> list[Question]:
        """Return what the store must be asked now; each needs one ``take_verdict``."""
        by_group: dict[int, list[Key]] = {}
        for key in self._unasked:
            by_group.setdefault(kv_group(key), []).append(key)
        self._unasked = []
        questions = []
        for number, keys in by_group.items():
            group = self._groups[number]
            questions.append(
                Question(
                    group=number,
                    keys=tuple(sorted(keys, key=group.ends.__getitem__)),
                    chained=group.chained,
                )
            )
        self._outstanding += len(questions)
        return questions

    def take_verdict(self, question: Question, present: Sequence[bool]) -> None:
        """Note which keys of a question the store has."""
        found = self._groups[question.group].present
        found.update(key for key, there in zip(question.keys, present, strict=True) if there)
        self._outstanding -= 1

    @property
    def undecided(self) -> bool:
        """Whether all verdicts are in and the match still waits to be decided."""
        return not self._decided and self._outstanding == 0 and not self._unasked

    def wanted(self) -> list[Key]:
        """Work out the match: what is worth a HIT and was not answered yet, front to back."""
        groups = [(g.ends, g.present, g.chained) for g in self._groups.values()]
        return [key for key in match(groups) if key not in self._answered]

    def saved_tokens(self, wanted: Sequence[Key]) -> int:
        """Return how many tokens are not computed when these keys are loaded, up to the last's end."""
        if not wanted:
            return 0
        group = self._groups[kv_group(wanted[0])]
        first = min(group.ends.values()) - _chunk_tokens(group.ends)
        return max(self._groups[kv_group(key)].ends[key] for key in wanted) - first

    @property
    def hits(self) -> int:
        """How many keys were answered HIT so far."""
        return len(self._answered)

    def decide(self, admitted: Iterable[Key]) -> None:
        """Fix the answers: HIT once for each admitted key, MISS for the rest."""
        self._admitted = set(admitted)
        self._decided = True


def match(groups: Sequence[tuple[Mapping[Key, int], set[Key], bool]]) -> list[Key]:
    """Return the keys that can serve a request, front to back.

    Args:
        groups: For each KV group: its keys with their end tokens, the present ones among them, and
            whether the group is used from the front (else: its last chunks, or its last state).
    """
    chosen: list[tuple[int, int, Key]] = []  # start token, end token, key
    boundary: int | None = None
    for ends, present, chained in groups:
        if not chained:
            continue
        chunk = _chunk_tokens(ends)
        run = list(itertools.takewhile(present.__contains__, sorted(ends, key=ends.__getitem__)))
        chosen += [(ends[key] - chunk, ends[key], key) for key in run]
        end = ends[run[-1]] if run else 0
        boundary = end if boundary is None else min(boundary, end)
    for ends, present, chained in groups:
        if chained:
            continue
        chunk = _chunk_tokens(ends)
        # A window's right edge may lie inside a chunk: vLLM rounds it up.
        usable = [key for key in present if boundary is None or ends[key] - chunk < boundary]
        if not usable:
            return []
        chosen += [(ends[key] - chunk, ends[key], key) for key in usable]
        if boundary is not None:
            boundary = min(boundary, max(ends[key] for key in usable))
    if boundary is not None:
        chosen = [choice for choice in chosen if choice[0] < boundary]
    return [key for _, _, key in sorted(chosen)]


def _chunk_tokens(ends: Mapping[Key, int]) -> int:
    """Return the tokens of one chunk of a group, from its keys' end tokens."""
    ordered = sorted(ends.values())
    return min(
        (after - before for before, after in itertools.pairwise(ordered)), default=ordered[0]
    )


class Chains:
    """The keys of one request with their end tokens and parents; grows with the request.

    vLLM names a request's keys front to back in each group, so a new key's parent is the one named
    last. A key inside what is known already, such as a state at a boundary of its own, follows the
    nearest one before it. Not thread-safe.
    """

    def __init__(self) -> None:
        self._places: dict[Key, tuple[int, Key | None]] = {}
        self._last: dict[int, tuple[int, Key]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def learn(self, keys: Iterable[tuple[Key, int]]) -> None:
        """Take further keys with their end tokens, in the order in which vLLM named them."""
        for key, end in keys:
            group = kv_group(key)
            last_end, last = self._last.get(group, (0, None))
            if last is None or end > last_end:
                self._places[key] = (end, last)
                self._last[group] = (end, key)
            else:
                self._places[key] = (end, self._nearest_before(group, end))

    def place(self, key: Key) -> tuple[int, Key | None]:
        """Return a key's end token and its parent; (0, None) for a key that is not known."""
        return self._places.get(key, (0, None))

    def _nearest_before(self, group: int, end: int) -> Key | None:
        before = [
            (other_end, other)
            for other, (other_end, _) in self._places.items()
            if kv_group(other) == group and other_end < end
        ]
        return max(before)[1] if before else None


class Budget:
    """Slots of the CPU tier that are promised to matches. Not thread-safe.

    A request's promise ends when it is scheduled (its load then holds the slots itself), when it
    finishes, or when it grows old.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._promised: dict[str, int] = {}

    @property
    def slots(self) -> int:
        """How many slots there are at all."""
        return self._slots

    def reserve(self, request: str, slots: int) -> bool:
        """Promise ``slots`` to a request, unless others' promises leave too few."""
        own = self._promised.get(request, 0)
        others = sum(self._promised.values()) - own
        if others and others + own + slots > self._slots:
            return False
        self._promised[request] = own + slots
        return True

    def release(self, request: str) -> None:
        """End a request's promise, if it has one."""
        self._promised.pop(request, None)
