"""What a worker's part of the store holds of a request: questions under way, and their answers.

A find goes in two rounds: first the groups that are used from the front, then windows, below where those
end. Of windows the last is of most use, and a store looks for a bounded number of chunks that its index
does not know, so they are asked about from the last to the first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from prefixstore.ioproc.client import IoClient
from prefixstore.ioproc.jobs import FindDone
from prefixstore.vllm.direct.messages import FindOrder

__all__ = ["Finds"]


@dataclass(slots=True, eq=False)
class _Find:
    """A find under way.

    Attributes:
        flags: Of each group, as far as they are known.
        asked: The groups that are asked about now.
    """

    order: FindOrder
    flags: list[bytes]
    asked: set[int] = field(default_factory=set)


class Finds:
    """The finds of one worker. Not thread-safe.

    Args:
        next_ticket: Gives the tickets of the I/O client.

    Attributes:
        answers: Ticket of the order → of each group one byte a chunk; for the caller to take.
    """

    def __init__(self, next_ticket: Callable[[], int]) -> None:
        self._next_ticket = next_ticket
        self._under_way: dict[int, tuple[_Find, int]] = {}
        self.answers: dict[int, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def refuse(self, order: FindOrder) -> None:
        """Answer that nothing is there."""
        self.answers[order.ticket] = (b"",) * len(order.groups)

    def start(self, order: FindOrder, client: IoClient) -> None:
        """Ask the store."""
        find = _Find(order, [b""] * len(order.groups))
        if not self._ask(client, find, is_chained=True):
            self._ask_windows(client, find)

    def take(self, done: FindDone, client: IoClient) -> None:
        """Take an answer of the store's."""
        find, number = self._under_way.pop(done.ticket)
        is_chained = find.order.groups[number].is_chained
        find.flags[number] = bytes(done.present if is_chained else done.present[::-1])
        find.asked.discard(number)
        if find.asked:
            return
        if is_chained:
            self._ask_windows(client, find)
        else:
            self.answers[find.order.ticket] = tuple(find.flags)

    def _ask(
        self, client: IoClient, find: _Find, *, is_chained: bool, most_tokens: int | None = None
    ) -> bool:
        """Ask about the groups of one kind; False if there is nothing to ask."""
        for number, group in enumerate(find.order.groups):
            most = None if most_tokens is None else most_tokens // group.chunk_tokens
            keys = group.keys[:most]
            if group.is_chained is not is_chained or not keys:
                continue
            find.asked.add(number)
            ticket = self._next_ticket()
            self._under_way[ticket] = (find, number)
            client.find(ticket, keys if is_chained else keys[::-1], chained=is_chained)
        return bool(find.asked)

    def _ask_windows(self, client: IoClient, find: _Find) -> None:
        ends = [
            sum(flags) * group.chunk_tokens
            for group, flags in zip(find.order.groups, find.flags, strict=True)
            if group.is_chained
        ]
        if not self._ask(client, find, is_chained=False, most_tokens=min(ends, default=None)):
            self.answers[find.order.ticket] = tuple(find.flags)
