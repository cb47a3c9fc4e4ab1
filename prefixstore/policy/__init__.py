"""Decisions over plain records: what goes, what is worth keeping. Pure: no OS, no clock, no LMDB."""
