"""PrefixStore: the one object that composes the tree and the index."""

from prefixstore.store.reconcile import ReconcileReport
from prefixstore.store.store import PrefixStore
from prefixstore.store.values import (
    Chunk,
    EvictionReport,
    Loaded,
    NamespaceStats,
    PlannedGroup,
    SkipReason,
    StoreOutcome,
    StoreStats,
)
from prefixstore.tree.blobs import Miss

__all__ = [
    "Chunk",
    "EvictionReport",
    "Loaded",
    "Miss",
    "NamespaceStats",
    "PlannedGroup",
    "PrefixStore",
    "ReconcileReport",
    "SkipReason",
    "StoreOutcome",
    "StoreStats",
]
