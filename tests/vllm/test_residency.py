"""Whether the scheduler's side knows which adapters a worker holds: against the worker's own rule."""

from collections import OrderedDict
from dataclasses import dataclass
from random import Random

import pytest

from prefixstore.vllm.residency import Residency, Stay

ADAPTERS = (1, 2, 3)
WALKS, STEPS = 2_000, 50
"""So many that each part of the rule is missed by some walk if it is left out."""


class Worker:
    """Holds the adapters used last, as vLLM's worker does; each reading of files has a number of its own."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()
        self.readings = 0

    def use(self, adapter: int) -> None:
        """Load an adapter unless it is held, turning out the oldest that is not pinned."""
        if adapter not in self.held:
            if len(self.held) >= self.capacity:
                oldest = next((held for held in self.held if held not in self.pinned), None)
                if oldest is None:
                    return  # vLLM fails the request.
                del self.held[oldest]
            self.readings += 1
            self.held[adapter] = self.readings
        self.held.move_to_end(adapter)


@dataclass(eq=False)
class Running:
    """A request in the engine; ``loads``: it was allowed to load for its next step."""

    adapter: int
    stay: Stay
    loads: bool = False


class Serving:
    """An engine and its worker beside what the scheduler's side tells of the worker.

    As in vLLM requests arrive long before they run, run in any order (one that waits for its lookup is passed
    over), and no more adapters run at a time than fit. A step is scheduled, with the lookups of those that are
    new in it, and executed later; more requests may arrive in between, and running ones may end.
    """

    def __init__(self, chance: Random) -> None:
        capacity = chance.randint(1, 2)
        self.worker, self.residency = Worker(capacity), Residency(capacity)
        self.chance = chance
        self.proved: dict[
            Stay, int
        ] = {}  # Which reading the worker held when its files were proved.
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.step: list[Running] = []
        self.done: list[tuple[object, ...]] = [("capacity", capacity)]

    def act(self) -> None:
        """Do one thing that vLLM may do now."""
        possible = [self.arrive, self.arrive]
        possible += [self.finish, self.finish] if self.running else []
        if self.step:
            possible += [self.compute, self.compute]
        else:
            possible += [self.load, self.keep_or_drop]
            possible += [self.schedule, self.schedule] if self.waiting else []
        self.chance.choice(possible)()

    def arrive(self) -> None:
        """Take a request."""
        adapter = self.chance.choice(ADAPTERS)
        self.done.append(("arrive", adapter))
        stay = self.residency.mention(adapter)
        self.residency.begin_request(adapter)
        self.waiting.append(Running(adapter, stay))

    def schedule(self) -> None:
        """Look some that wait up, and have them run in the next step with those that run already."""
        chosen = []
        for request in self.chance.sample(self.waiting, min(2, len(self.waiting))):
            busy = {other.adapter for other in self.running} | self.worker.pinned
            if len({request.adapter, *busy}) <= self.worker.capacity:
                request.loads = request.stay.is_proven and not request.stay.is_over
                self.waiting.remove(request)
                self.running.append(request)
                chosen.append(request)
        self.done.append(("schedule", *[(request.adapter, request.loads) for request in chosen]))
        for request in chosen:
            self.residency.used(request.adapter)
        self.step = list(self.running)

    def compute(self) -> None:
        """Run the step; what it computed is proved to be of the files that were read."""
        step, self.step = self.step, []
        self.chance.shuffle(step)  # A worker takes the adapters of a step in any order.
        self.done.append(("compute", *[request.adapter for request in step]))
        for request in step:
            if request.loads:
                held = self.worker.held.get(request.adapter)
                assert self.proved[request.stay] == held, self.done
            self.worker.use(request.adapter)
        for request in step:
            request.loads = False
            self.prove(request.adapter, request.stay)

    def prove(self, adapter: int, stay: Stay) -> None:
        """Note that what the worker holds is of the files at hand."""
        if adapter in self.worker.held:
            stay.is_proven = True
            self.proved[stay] = self.worker.held[adapter]

    def finish(self) -> None:
        """End one of those that run; a step that is under way still uses its adapter."""
        request = self.running.pop(self.chance.randrange(len(self.running)))
        self.done.append(("finish", request.adapter))
        self.residency.end_request(request.adapter)

    def load(self) -> None:
        """Have the worker load an adapter, as a server is told to; it is proved right after."""
        adapter = self.chance.choice(ADAPTERS)
        self.done.append(("load", adapter))
        stay = self.residency.mention(adapter)
        self.worker.use(adapter)
        self.residency.used(adapter)
        self.prove(adapter, stay)

    def keep_or_drop(self) -> None:
        """Pin an adapter if room is left for another, or drop it if it does not run."""
        adapter, worker = self.chance.choice(ADAPTERS), self.worker
        if adapter in worker.held and len(worker.pinned) < worker.capacity - 1:
            self.done.append(("pin", adapter))
            worker.pinned.add(adapter)
            self.residency.pin(adapter)
        elif all(other.adapter != adapter for other in self.running):
            self.done.append(("drop", adapter))
            worker.held.pop(adapter, None)
            worker.pinned.discard(adapter)
            self.residency.end(adapter)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_loaded_for_was_not_read_again_since_its_proof(seed: int) -> None:
    """Whatever arrives, runs, ends, is pinned or dropped; files may be replaced at any time."""
    for serving in [Serving(Random(f"{seed} {walk}")) for walk in range(WALKS)]:
        for _ in range(STEPS):
            serving.act()


def test_as_many_others_as_fit_end_a_stay() -> None:
    """With room for two, one other leaves an adapter where it is; a second may have turned it out."""
    residency = Residency(2)
    stay = residency.mention(1)
    stay.is_proven = True

    residency.mention(2)
    assert stay is residency.mention(1)
    residency.mention(2)
    residency.mention(3)

    assert stay.is_over
    assert not residency.mention(1).is_proven


def test_one_that_still_runs_counts_though_it_came_before() -> None:
    """It may be used after the one that was mentioned later, and then leaves after it."""
    residency = Residency(2)
    residency.mention(1)
    residency.begin_request(1)
    stay = residency.mention(2)
    residency.mention(3)

    assert stay.is_over


def test_a_mention_alone_does_not_make_an_adapter_recent() -> None:
    """It waits, another one is used that was mentioned after it: the worker turns out the one that waits."""
    residency = Residency(2)
    stay = residency.mention(1)
    residency.used(1)
    stay.is_proven = True
    residency.mention(2)
    residency.used(2)

    residency.mention(1)
    residency.mention(3)

    assert stay.is_over


def test_an_adapter_that_is_used_again_stays() -> None:
    """From then on others count anew."""
    residency = Residency(2)
    stay = residency.mention(1)
    residency.mention(2)
    residency.used(1)
    residency.mention(3)

    assert not stay.is_over


def test_one_that_runs_counts_after_a_use_too() -> None:
    """It may be used once more right after it."""
    residency = Residency(2)
    residency.mention(1)
    residency.begin_request(1)
    stay = residency.mention(2)
    residency.used(2)
    residency.mention(3)

    assert stay.is_over


def test_with_more_in_turn_than_fit_none_is_sure() -> None:
    """One that runs already may be used at any time, and turn out the one that was just used."""
    residency = Residency(1)
    residency.mention(2)
    residency.begin_request(2)
    stay = residency.mention(1)
    residency.used(1)

    assert stay.is_over


def test_pinned_adapters_leave_less_room() -> None:
    """With one of two places taken for good, the next adapter turns out the last."""
    residency = Residency(2)
    residency.pin(1)
    stay = residency.mention(2)
    residency.mention(3)

    assert stay.is_over


def test_pinning_leaves_less_room_at_once() -> None:
    """Those that ran beside it may now turn each other out."""
    residency = Residency(2)
    stay = residency.mention(1)
    residency.mention(2)
    residency.pin(3)

    assert stay.is_over


def test_stays_that_are_over_are_forgotten() -> None:
    """However many adapters come by, no more stays are kept than adapters fit."""
    residency = Residency(4)
    for adapter in range(1, 10_000):
        residency.mention(adapter)

    assert 4 == len(residency)
