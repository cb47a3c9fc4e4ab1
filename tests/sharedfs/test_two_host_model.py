"""Two hosts do what a dict does, though each sees the other late, by a wrong clock, and dies at any call."""

from hypothesis import HealthCheck, settings

from prefixstore.testing.two_hosts import TwoHostMachine

TestTwoHosts = TwoHostMachine.TestCase
TestTwoHosts.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
