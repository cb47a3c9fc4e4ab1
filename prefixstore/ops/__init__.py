"""Maintenance of a root: plan first, then execute."""
