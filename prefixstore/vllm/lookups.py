"""What to answer vLLM's lookups: pure state machines, no I/O, no clock.

vLLM's scheduler asks for one key after the other, in every step until all answers are final, and each
HIT at once takes a slot of the CPU tier (vllm/v1/kv_offload/tiering/manager.py, ``lookup``). So for each
request:

1. every key is answered RETRY until the store has said which of them it has: first those of groups that
   are used from the front, then those of **windowed** groups (a sliding window, a state) that lie in what
   the others have, last one first, since the window that is nearest to the end serves;
2. from those the **match** is worked out: of a group that is used from the front, the run of present keys
   from the first; of a windowed group, what vLLM needs before the point where the match ends;
3. the match is admitted when the CPU tier has room for it beside the matches of other requests; it is
   cut when it would not fit an empty tier;
4. each key of the match is answered HIT once; every other question is answered MISS.

Rule 4 is what ends a prefix longer than the CPU tier: a chunk that was promoted and evicted before use
is not promoted again for the same request, which would go on for ever. All promotions of a request
together are no more than the tier has slots, so that its later chunks do not turn out its first ones.

vLLM does not ask us for a chunk that its CPU tier holds. So what lies between keys that were asked about,
or before the first of them, and was not asked about, counts as there.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from prefixstore.keys import Key, kv_group

__all__ = [
    "Answer",
    "AskedGroup",
    "Budget",
    "Chains",
    "Question",
    "Reach",
    "RequestLookup",
    "match",
]


class Answer(Enum):
    """What the scheduler is told about one key."""

    MISS = auto()
    HIT = auto()
    RETRY = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The keys of one group to ask the store about.

    In the order of the prompt if ``chained``; else the most useful first, since the store may not look
    for all.
    """

    group: int
    keys: tuple[Key, ...]
    chained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What of one KV group a prompt needs to go on after some token.

    Attributes:
        chunk_tokens: Tokens of one chunk.
        window_chunks: How many chunks before that token; None: all of them, from the first.
        window_tokens: How many tokens before it a sliding window keeps: where it lies inside a chunk, they
            may begin one chunk earlier.
        is_guessed: Nobody has said more than ``chunk_tokens``: the direction of vLLM's scan tells a window,
            and all of its chunks count as needed.
    """

    chunk_tokens: int
    window_chunks: int | None = None
    window_tokens: int = 0
    is_guessed: bool = False

    def chunks_before(self, token: int) -> int:
        """Return how many chunks of a window are needed at a token, the one that it is in among them.

        As vLLM does (offloading/scheduler.py, ``load_window_size_in_chunks``). It may stop one token before
        the end of what it asks for, so a token at a chunk's end counts as if it were the one before.
        """
        assert self.window_chunks is not None, "asked of windows"
        padding = max(1, -token % self.chunk_tokens)
        return max(self.window_chunks, -(-(self.window_tokens + padding) // self.chunk_tokens))


@dataclass(slots=True, kw_only=True)
class AskedGroup:
    """The keys of one KV group in the order the scheduler asked, each with its end token.

    A key whose chunk is no whole one is a **tail**: vLLM asks for those once it knows how many whole chunks
    hit, and can use one if every group has it.
    """

    reach: Reach
    ends: dict[Key, int] = field(default_factory=dict)
    present: set[Key] = field(default_factory=set)
    _known: int = 0
    _by_end: dict[int, Key] = field(default_factory=dict)

    @property
    def is_chained(self) -> bool:
        """Whether the group is used from the front, as it is for full attention."""
        if not self.reach.is_guessed:
            return self.reach.window_chunks is None
        first = list(itertools.islice(self.ends.values(), 2))
        return first == sorted(first)

    def is_tail(self, key: Key) -> bool:
        """Whether a key is of a chunk that is not whole."""
        return self.ends[key] % self.reach.chunk_tokens != 0

    def start(self, key: Key) -> int:
        """Return the first token of a whole chunk."""
        return self.ends[key] - self.reach.chunk_tokens

    def by_end(self) -> dict[int, Key]:
        """Return the whole chunks by their end tokens, front to back."""
        if self._known != len(self.ends):
            self._known = len(self.ends)
            pairs = ((end, key) for key, end in self.ends.items() if not self.is_tail(key))
            self._by_end = dict(sorted(pairs))
        return self._by_end

    @property
    def first_token(self) -> int:
        """The first token that was asked about."""
        return (min(self.ends.values()) - 1) // self.reach.chunk_tokens * self.reach.chunk_tokens

    def first_missing(self) -> int | None:
        """Return the first token of the first chunk that was asked about and is not present."""
        for key in self.by_end().values():
            if key not in self.present:
                return self.start(key)
        return None

    def needed_before(self, boundary: int) -> tuple[list[Key], int]:
        """Find what serves a windowed group at the last point up to ``boundary`` where it can go on.

        It is vLLM's search (offloading/scheduler.py, ``_sliding_window_lookup``): back to front for as
        many chunks in a row as it needs, or as many as there are at the very front.

        Returns:
            The keys, and that point; 0 if there is none.
        """
        by_end, chunk = self.by_end(), self.reach.chunk_tokens
        if self.reach.is_guessed:
            usable = [
                key for key in by_end.values() if key in self.present and self.start(key) < boundary
            ]
            return usable, min(boundary, max(map(self.ends.__getitem__, usable), default=0))
        first, last = min(by_end), min(max(by_end), -(-boundary // chunk) * chunk)
        needed = self.reach.chunks_before(min(boundary, last))
        run: list[Key] = []
        front = first - chunk
        end, length = front, 0
        for here in range(last, front, -chunk):
            key = by_end.get(here)
            if key is not None and key not in self.present:
                run, end, length = [], front, 0
                needed = self.reach.chunks_before(here - chunk)
                continue
            end, length = (end if length else here), length + 1
            run += [] if key is None else [key]
            if length == needed:
                break
        return run, min(boundary, end)


class RequestLookup:
    """The lookups of one request. Not thread-safe.

    Args:
        reaches: What a prompt needs of each KV group that may be asked about.
    """

    def __init__(self, reaches: Mapping[int, Reach]) -> None:
        self._reaches = reaches
        self._groups: dict[int, AskedGroup] = {}
        self._unasked: list[Key] = []
        self._waiting: list[
            Key
        ] = []  # Not asked about before the groups that are used from the front.
        self._outstanding = 0
        self._wanted: dict[int | None, list[Key]] = {}
        self._decided = False
        self._admitted: set[Key] = set()
        self._answered: set[Key] = set()

    def ask(self, key: Key, end_token: int) -> Answer:
        """Answer the scheduler's question for one key."""
        number = kv_group(key)
        if (group := self._groups.get(number)) is None:
            group = self._groups[number] = AskedGroup(reach=self._reaches[number])
        if key not in group.ends:
            group.ends[key] = end_token
            self._unasked.append(key)
            self._decided = False
            self._wanted.clear()
            return Answer.RETRY
        if not self._decided:
            return Answer.RETRY
        if key in self._admitted and key not in self._answered:
            self._answered.add(key)
            self._wanted.clear()
            return Answer.HIT
        return Answer.MISS

    def take_questions(self) -> list[Question]:
        """Return what the store must be asked now; each needs one ``take_verdict``.

        Windows wait for the verdicts of the other groups: most of what they would be asked about is of no
        use, and a store looks for a bounded number of keys.
        """
        chained = {number: group.is_chained for number, group in self._groups.items()}
        by_group: dict[int, list[Key]] = {}
        for key in self._unasked:
            number = kv_group(key)
            if chained[number] and not self._groups[number].is_tail(key):
                by_group.setdefault(number, []).append(key)
            else:
                self._waiting.append(key)
        self._unasked.clear()
        are_chained = bool(by_group) or self._outstanding > 0
        if not are_chained:
            self._drop_useless()
            for key in self._waiting:
                by_group.setdefault(kv_group(key), []).append(key)
            self._waiting.clear()
        questions = []
        for number, keys in by_group.items():
            keys.sort(key=self._groups[number].ends.__getitem__, reverse=not are_chained)
            questions.append(Question(group=number, keys=tuple(keys), chained=are_chained))
        self._outstanding += len(questions)
        return questions

    def take_verdict(self, question: Question, present: Sequence[bool]) -> None:
        """Note which keys of a question the store has."""
        found = self._groups[question.group].present
        found.update(key for key, there in zip(question.keys, present, strict=True) if there)
        self._outstanding -= 1
        self._wanted.clear()
        if self._outstanding == 0 and not self._unasked:
            self._drop_useless()

    def _drop_useless(self) -> None:
        """Ask about no window that lies behind what the other groups have."""
        end = _chained_end(list(self._groups.values()))
        waiting, self._waiting = self._waiting, []
        for key in waiting:
            group = self._groups[kv_group(key)]
            if group.is_tail(key) or group.start(key) < end:
                self._waiting.append(key)

    @property
    def undecided(self) -> bool:
        """Whether all verdicts are in and the match still waits to be decided."""
        return not (self._decided or self._outstanding or self._unasked or self._waiting)

    def wanted(self, *, most: int | None = None) -> list[Key]:
        """Work out the match: what is worth a HIT and was not answered yet, front to back.

        Args:
            most: Take an earlier end where it is needed to keep to so many keys.
        """
        if most not in self._wanted:
            found = self._match()
            if most is not None and len(found) > most:
                ends = sorted(
                    {end for group in self._groups.values() for end in group.ends.values()}
                )
                fitting = bisect_right(ends, most, key=lambda end: len(self._match(boundary=end)))
                found = self._match(boundary=ends[fitting - 1]) if fitting else []
            self._wanted[most] = found
        return self._wanted[most]

    def _match(self, *, boundary: int | None = None) -> list[Key]:
        found = match(list(self._groups.values()), boundary=boundary)
        return [key for key in found if key not in self._answered]

    def saved_tokens(self, wanted: Sequence[Key]) -> int:
        """Return how many tokens are not computed when these keys are loaded, up to the last's end."""
        if not wanted:
            return 0
        first = min(group.first_token for group in self._groups.values())
        return max(self._groups[kv_group(key)].ends[key] for key in wanted) - first

    @property
    def hits(self) -> int:
        """How many keys were answered HIT so far."""
        return len(self._answered)

    def decide(self, admitted: Iterable[Key]) -> None:
        """Fix the answers: HIT once for each admitted key, MISS for the rest."""
        self._admitted = set(admitted)
        self._decided = True


def match(groups: Sequence[AskedGroup], *, boundary: int | None = None) -> list[Key]:
    """Return the keys that can serve a request, front to back.

    Args:
        groups: The KV groups that were asked about.
        boundary: A token that the match is not to go beyond.
    """
    end = _chained_end(groups)
    end = end if boundary is None else min(end, boundary)
    windowed = [group for group in groups if not group.is_chained and group.by_end()]
    chosen: list[tuple[int, int, Key]] = []  # start token, end token, key
    is_settled = False
    while not is_settled:
        is_settled, chosen = True, []
        for group in windowed:
            keys, reached = group.needed_before(end)
            # What serves a group there may not be there for the groups before it.
            is_settled &= reached == end
            end = reached
            chosen += [(group.start(key), group.ends[key], key) for key in keys]
    for group in groups:
        if group.is_chained:
            whole = (key for key in group.by_end().values() if group.start(key) < end)
            chosen += [(group.start(key), group.ends[key], key) for key in whole]
    chosen = [choice for choice in chosen if choice[0] < end]
    chosen += _tail(groups, end) if boundary is None else []
    return [key for _, _, key in sorted(chosen)]


def _chained_end(groups: Sequence[AskedGroup]) -> int:
    """Return the token up to which no group that is used from the front lacks anything."""
    missing = [group.first_missing() for group in groups if group.is_chained]
    asked = [end for group in groups for end in group.by_end()]
    return min((start for start in missing if start is not None), default=max(asked, default=0))


def _tail(groups: Sequence[AskedGroup], end: int) -> list[tuple[int, int, Key]]:
    """Return the keys of the furthest tail behind ``end`` that every group has."""
    tails: dict[int, list[tuple[AskedGroup, Key]]] = {}
    for group in groups:
        for key, key_end in group.ends.items():
            if group.is_tail(key) and key_end > end:
                tails.setdefault(key_end, []).append((group, key))
    usable = [
        tail_end
        for tail_end, tail in tails.items()
        if all(key in group.present for group, key in tail)
    ]
    return [(end, max(usable), key) for _, key in tails[max(usable)]] if usable else []


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

    A request's promise ends when it is scheduled, for the first time or again (its load then holds the slots
    itself), and when it finishes.
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
