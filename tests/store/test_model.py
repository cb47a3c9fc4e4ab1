"""PrefixStore does what a dict does, through crashes, lost indexes and two hosts at once."""

from hypothesis import HealthCheck, settings

from prefixstore.testing.model import StoreMachine

TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
