"""Prompts without a server: which chunks they are made of, and computing those ahead of need."""
