"""What the scheduler's side and the workers of the direct path tell each other, once in each step.

Orders go down with the step, the same to every worker; reports come back with its output. Plain
values: they cross processes by pickle, within one engine.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixstore.keys import Key

__all__ = [
    "FindOrder",
    "GroupFind",
    "LoadChunk",
    "LoadOrder",
    "RankReport",
    "StepOrders",
    "StepReport",
    "StoreOrder",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFind:
    """The chunks of one KV group, from the first.

    Attributes:
        chunk_tokens: Tokens of one.
        is_chained: Those behind the first missing one are of no use, nor are other groups' behind it.
    """

    keys: "tuple[Key, ...]"
    chunk_tokens: int
    is_chained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FindOrder:
    """Which of these chunks does your part of the store hold?"""

    ticket: int
    groups: tuple[GroupFind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadChunk:
    """One chunk to load.

    Attributes:
        blocks: Where it goes: the blocks of positions ``first``, ``first + 1``, ... of the chunk.
            Blocks before ``first`` are in the engine's own cache, which others may be reading.
    """

    key: "Key"
    blocks: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """Load these chunks for a request, front to back.

    Attributes:
        doomed: Blocks that cannot be loaded: to be reported as such.
        is_whole: Of a load that failed in part nothing is used: the request is reported, not its blocks.
            vLLM can cut a request short at a block only where it keeps all blocks before it.
    """

    request_id: str
    chunks: tuple[LoadChunk, ...]
    doomed: tuple[int, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOrder:
    """Store one chunk.

    Attributes:
        number: Comes back once the blocks are no longer needed, whether stored or dropped.
    """

    number: int
    request_id: str
    key: "Key"
    parent: "Key | None"
    end_token: int
    blocks: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class StepOrders:
    """What the workers are to do in one step.

    Attributes:
        number: Of the step, from 1; a worker that misses one knows that it failed.
        proven: The last step that every rank has ended, as all before it.
        stores: Of blocks that are computed when this step's forward pass has ended.
        late_stores: Of blocks that earlier steps have computed.
        overwritten: Numbers of stores whose blocks this step gives away: not to be read any more.
        are_all_overwritten: Nobody could tell which: no store of an earlier step is to be read.
        touched: Keys that were used.
        is_off: Neither store nor find from now on; what is waiting is dropped.
        is_idle: No forward pass belongs to this step.
    """

    number: int = 0
    proven: int = 0
    finds: list[FindOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    stores: list[StoreOrder] = field(default_factory=list)
    late_stores: list[StoreOrder] = field(default_factory=list)
    overwritten: list[int] = field(default_factory=list)
    are_all_overwritten: bool = False
    touched: "list[Key]" = field(default_factory=list)
    is_off: bool = False
    is_idle: bool = False


@dataclass(slots=True, kw_only=True)
class RankReport:
    """What one worker has to say after a step.

    Attributes:
        found: Ticket → for each group of a find one byte a chunk: whether it holds it.
        settled: Numbers of stores whose blocks it no longer needs.
        loads: Bytes, seconds and number of loads that ran together.
        ends_step: A step that computed something has ended.
        ended: The last step that it has ended, as all before it; told where ranks compute together.
        is_off: Its store is off for good.
    """

    found: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    settled: list[int] = field(default_factory=list)
    loads: list[tuple[float, float, int]] = field(default_factory=list)
    ends_step: bool = False
    ended: int = 0
    is_off: bool = False

    @property
    def tells(self) -> bool:
        """Whether there is anything in it."""
        told = (self.found, self.settled, self.loads, self.ends_step, self.ended, self.is_off)
        return any(told)


@dataclass(slots=True, kw_only=True)
class StepReport:
    """The reports of some workers, by rank."""

    ranks: dict[int, RankReport] = field(default_factory=dict)

    def join(self, other: "StepReport") -> "StepReport":
        """Join the reports of two sets of workers."""
        joined = StepReport(ranks={rank: RankReport() for rank in {*self.ranks, *other.ranks}})
        for part in (self, other):
            for rank, report in part.ranks.items():
                joined.ranks[rank].found.update(report.found)
                joined.ranks[rank].settled.extend(report.settled)
                joined.ranks[rank].loads.extend(report.loads)
                joined.ranks[rank].ends_step |= report.ends_step
                joined.ranks[rank].ended = max(joined.ranks[rank].ended, report.ended)
                joined.ranks[rank].is_off |= report.is_off
        return joined
