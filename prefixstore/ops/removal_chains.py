"""Which chunks go when prompts are erased, or what a pin held: a plan, to be carried out like any other.

A chunk's KV is made of all tokens before its end. So what holds something of a prompt's end holds the
prompt, and goes: its last whole chunk with all that follow it. Chunks before that go, too, from the end
backwards, for as long as nothing that stays follows them: where another stored prompt branches off, the
two have the same text up to there, and what they share stays unless it is asked for as well.

A block's hash is the same in every KV group, so a chunk goes in all groups or in none.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from prefixstore.index.base import Row
from prefixstore.keys import Key, NamespaceId, kv_group
from prefixstore.ops.removal import RemovalPlan
from prefixstore.store import PrefixStore
from prefixstore.tree.quarantine import Quarantine

__all__ = ["Chains", "chains_of_keys", "chains_of_prompts", "plan_chains"]

GROUP_BYTES = 4
_QUARANTINED = re.compile(r"[a-z_]+\.[0-9a-f]{8}\.([0-9a-f]+)\.kv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """What to erase in one namespace.

    Attributes:
        keys: All chunks of the prompts, stored or not.
        ends: The last whole chunk of each prompt, in each KV group.
    """

    keys: frozenset[Key]
    ends: frozenset[Key]


def chains_of_prompts(prompts: Iterable[Iterable[Key]]) -> Chains:
    """Return the chains of prompts, each given as its keys, front to back in each KV group."""
    keys: set[Key] = set()
    ends: set[Key] = set()
    for prompt in prompts:
        last: dict[int, Key] = {}
        for key in prompt:
            keys.add(key)
            last[kv_group(key)] = key
        ends.update(last.values())
    return Chains(keys=frozenset(keys), ends=frozenset(ends))


def chains_of_keys(store: PrefixStore, namespace: NamespaceId, keys: Collection[Key]) -> Chains:
    """Return the chains that a pin's keys make: one that is no other's parent ends a chain."""
    records = store.hints.get_many(namespace, list(keys))
    parents = {record.parent for record in records if record is not None}
    return Chains(keys=frozenset(keys), ends=frozenset(key for key in keys if key not in parents))


def plan_chains(
    store: PrefixStore,
    chains: Mapping[NamespaceId, Chains],
    *,
    shared: bool = False,
    released: Collection[str] = (),
) -> RemovalPlan:
    """Plan to erase chains of chunks.

    Args:
        store: The root, with its index reconciled.
        chains: What to erase, by namespace.
        shared: Erase also what other stored prompts share with these, and all that follows it.
        released: Names of pins that keep nothing any more: they are removed with the chunks.

    Raises:
        InvalidError: A pin's file is damaged: what it held must not be guessed. Or the index does not hold
            all of the root.
        UnavailableError: The pins or the quarantine cannot be read, or the index was cleared or failed meanwhile.
    """
    store.check_whole()
    pinned = _pinned(store, released)
    rows: list[Row] = []
    kept = spared = 0
    erased: set[Key] = set()
    for namespace, wanted in chains.items():
        stored = {row.key: row for row in store.hints.scan(namespace)}
        doomed = _doom(stored, wanted, shared=shared)
        needed = _needed(stored, pinned.get(namespace, set()))
        rows += [stored[key] for key in doomed - needed]
        kept += len(doomed & needed)
        spared += len((wanted.keys & stored.keys()) - doomed)
        erased |= (wanted.keys | doomed) - needed
    store.check_whole()
    rows.sort(key=lambda row: -row.record.end_token)
    return RemovalPlan(
        chunks=tuple((row.namespace, row.key) for row in rows),
        file_bytes=sum(row.record.file_bytes for row in rows),
        pinned_chunks=kept,
        shared_chunks=spared,
        quarantined=tuple(_quarantined(store, erased)),
        unknown_keys=(),
        whole_namespace=None,
        released_pins=tuple(released),
    )


def _pinned(store: PrefixStore, released: Collection[str]) -> dict[NamespaceId, set[Key]]:
    now_s = store.server_now_s()
    pinned: dict[NamespaceId, set[Key]] = defaultdict(set)
    for pin in store.pins():
        if pin.name not in released and pin.holds(now_s):
            pinned[pin.namespace].update(pin.keys)
    return pinned


def _doom(stored: Mapping[Key, Row], wanted: Chains, *, shared: bool) -> set[Key]:
    """Return the stored chunks that hold something of the prompts and nothing that stays needs."""
    children: dict[Key, list[Key]] = defaultdict(list)
    same_block: dict[bytes, list[Key]] = defaultdict(list)
    for key, row in stored.items():
        same_block[key[:-GROUP_BYTES]].append(key)
        if row.record.parent is not None:
            children[row.record.parent].append(key)
    doomed: set[Key] = set()
    queue = [key for key in (wanted.keys if shared else wanted.ends) if key in stored]
    while queue:
        key = queue.pop()
        if key not in doomed:
            doomed.add(key)
            queue += children[key]
            queue += same_block[key[:-GROUP_BYTES]]
    rest = sorted(
        (key for key in wanted.keys if key in stored and key not in doomed),
        key=lambda key: -stored[key].record.end_token,
    )
    for key in rest:
        block = same_block[key[:-GROUP_BYTES]]
        if all(child in doomed for each in block for child in children[each]):
            doomed.update(block)
    return doomed


def _needed(stored: Mapping[Key, Row], pinned: Iterable[Key]) -> set[Key]:
    """Return the stored chunks that pins hold, with all that come before them."""
    needed: set[Key] = set()
    for key in pinned:
        at: Key | None = key
        while at is not None and at in stored and at not in needed:
            needed.add(at)
            at = stored[at].record.parent
    return needed


def _quarantined(store: PrefixStore, erased: Collection[Key]) -> Iterable[str]:
    """Return the names of damaged blobs of erased chunks: they still hold what can be read of them."""
    digits = {key.hex() for key in erased}
    for name, _ in Quarantine(store.root, bytes_max=0).contents():
        found = _QUARANTINED.fullmatch(name)
        if found is not None and found[1] in digits:
            yield name
