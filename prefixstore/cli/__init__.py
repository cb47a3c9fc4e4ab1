"""The prefixstore command."""
