"""Settings of all tests."""

from hypothesis import settings

# A loaded machine is no failure: the hang timeout of pytest is the limit that counts.
settings.register_profile("prefixstore", deadline=None)
settings.load_profile("prefixstore")
