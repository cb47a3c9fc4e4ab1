"""Whether the scheduler's side knows which adapters a worker holds: against the worker's own rule."""

from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from prefixstore.vllm.residency import Residency, Stay

ADAPTERS = st.integers(1, 3)


class Worker:
    """Holds the adapters used last, as vLLM's worker does, with the version of the files it read."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()

    def use(self, adapter: int, version: int) -> None:
        """Load an adapter unless it is held, turning out the oldest that is not pinned."""
        if adapter not in self.held:
            if len(self.held) >= self.capacity:
                oldest = next((held for held in self.held if held not in self.pinned), None)
                if oldest is None:
                    return  # vLLM fails the request.
                del self.held[oldest]
            self.held[adapter] = version
        self.held.move_to_end(adapter)


class Serving(RuleBasedStateMachine):
    """Whatever arrives, runs, ends, is pinned, dropped or replaced: a proved stay is in the worker.

    As vLLM does, requests are scheduled in their order and no more adapters run at a time than fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.versions = dict.fromkeys(range(1, 4), 0)
        self.waiting: list[tuple[int, Stay]] = []
        self.running: list[tuple[int, Stay]] = []

    @initialize(capacity=st.integers(1, 2))
    def start(self, capacity: int) -> None:
        """Start with room for some adapters."""
        self.worker, self.residency = Worker(capacity), Residency(capacity)

    @rule(adapter=ADAPTERS)
    def arrive(self, adapter: int) -> None:
        """Take a request, which is looked up at once."""
        stay = self.residency.mention(adapter)
        self.residency.begin_request(adapter)
        self.check(adapter, stay)
        self.waiting.append((adapter, stay))

    @rule()
    def compute(self) -> None:
        """Run a step of all that run; their chunks are stored if their files prove to be the first."""
        for adapter, stay in self.running:
            self.worker.use(adapter, self.versions[adapter])
            if self.versions[adapter] == 0 and adapter in self.worker.held:
                stay.is_proven = True

    @precondition(lambda self: self.waiting)
    @rule()
    def schedule(self) -> None:
        """Look the first that waits up once more, and run it with the others."""
        adapter, stay = self.waiting[0]
        if len({adapter, *dict(self.running)}) <= self.worker.capacity:
            self.check(adapter, stay)
            self.running.append(self.waiting.pop(0))
            self.compute()

    @precondition(lambda self: self.running)
    @rule(position=st.integers(0, 10))
    def finish(self, position: int) -> None:
        """End one of those that run."""
        adapter, _ = self.running.pop(position % len(self.running))
        self.residency.end_request(adapter)

    @rule(adapter=ADAPTERS, what=st.sampled_from(["replaced", "pinned", "removed"]))
    def disturb(self, adapter: int, what: str) -> None:
        """Replace an adapter's files, pin it if room is left for another, or drop it if it does not run."""
        worker = self.worker
        match what:
            case "replaced":
                self.versions[adapter] += 1
            case "pinned" if adapter in worker.held and len(worker.pinned) < worker.capacity - 1:
                worker.pinned.add(adapter)
                self.residency.pin(adapter)
            case "removed" if adapter not in dict(self.running):
                worker.held.pop(adapter, None)
                worker.pinned.discard(adapter)
                self.residency.end(adapter)

    def check(self, adapter: int, stay: Stay) -> None:
        """What may be loaded for is held, with the content that was proved."""
        if stay.is_proven and not stay.is_over:
            assert 0 == self.worker.held.get(adapter)


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=500, stateful_step_count=25)


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


def test_pinned_adapters_leave_less_room() -> None:
    """With one of two places taken for good, the next adapter turns out the last."""
    residency = Residency(2)
    residency.pin(1)
    stay = residency.mention(2)
    residency.mention(3)

    assert stay.is_over


def test_stays_that_are_over_are_forgotten() -> None:
    """However many adapters come by, no more stays are kept than adapters fit."""
    residency = Residency(4)
    for adapter in range(1, 10_000):
        residency.mention(adapter)

    assert 4 == len(residency)
