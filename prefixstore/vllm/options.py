"""What users may say in ``kv_connector_extra_config``, and what vLLM is told in turn.

One option is enough: ``root``. Everything that vLLM has an option for keeps vLLM's name and meaning and
passes through. vLLM itself ignores unknown names, so a misspelt option would silently do nothing;
here it is refused.

``expand`` is pure: vLLM reads the expanded options in the scheduler, in each worker and in the API
server's process (for the metrics), and all of them must see the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.ioproc.jobs import Limits

__all__ = ["FRONT_DOOR", "MachineMemory", "TierOptions", "check_options", "expand"]

VLLM_OPTIONS = frozenset(
    {
        "backpressure",
        "block_size",
        "blocks_per_chunk",
        "cache_policy_module_path",
        "cpu_bytes_to_use",
        "eviction_policy",
        "offload_prompt_only",
        "self_describing_kv_events",
    }
)
"""vLLM's own options of its tiered offloading, which pass through (vllm/v1/kv_offload)."""

FRONT_DOOR = "behind_front_door"
"""Set in a tier's options by ``expand`` alone: the connector will bind this tier to its namespace."""

DIRECT_OPTIONS = frozenset({"blocks_per_chunk", "offload_prompt_only"})
"""Those that mean something without a CPU tier too."""

TIER_OPTIONS = frozenset({"adapters", "enable_kv_events", "locality"})
"""Ours that mean something with a CPU tier only."""

CPU_BYTES_LARGEST = 4 * 2**30
"""The CPU tier's size when the user names none: it stages chunks between the device and the root, and
saves reads of what was used just now. More is better where there is more."""

POSITIVE_SECONDS = Annotated[float, Meta(gt=0)]


class TierOptions(StoreConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one tier: those of the store, and how it is driven.

    Attributes:
        root: The root's path; made when it is not there yet.
        mode: ``tier``: below vLLM's CPU tier. ``direct``: between the device and the root, with no
            CPU tier.
        namespace: Only under vLLM's bare tiering, which hides the model from us: a name for
            everything that decides the bytes. The front door works it out by itself.
        buffers_bytes: Memory for staging buffers, shared with the I/O process. In direct mode of
            each worker: half of it is the ring that the device copies from and to.
        load_threads: Reads in flight.
        store_threads: Writes in flight.
        find_deadline_s: The longest that a lookup may delay a request.
        load_deadline_s: Loads that make no progress for so long are recomputed.
        store_deadline_s: Stores that make no progress for so long are dropped.
        drain_s: How long a reset or an orderly shutdown waits for stores.
        enable_kv_events: Announce chunks stored and gone, where the engine publishes KV events at all.
        locality: What vLLM is told of where the root is, for KV events and ``kv_load_tiers``.
        shared_prefixes: Only behind the front door: keep windows and states inside a prompt, so that
            others that share its beginning hit; where the model has such groups.
        load_policy: ``auto`` declines a match that would clearly take longer to load than to compute,
            by what both took so far; ``always`` loads every match. Only the front door can tell how
            fast prompts are computed.
        adapters: Only behind the front door: ``bypass``, requests with an adapter (LoRA) neither load nor
            store; ``content``: they do, under keys that the content of the adapter's files is part of.
        weights: How local weights are identified: ``remembered`` digests where inode, size and times
            are unchanged, or ``full``: every file read at every start.
    """

    root: str
    mode: Literal["tier", "direct"] = "tier"
    namespace: str | None = None
    buffers_bytes: Annotated[int, Meta(ge=2**20)] = 256 * 2**20
    load_threads: Annotated[int, Meta(ge=1, le=64)] = 8
    store_threads: Annotated[int, Meta(ge=1, le=64)] = 4
    find_deadline_s: POSITIVE_SECONDS = 2.0
    load_deadline_s: POSITIVE_SECONDS = 10.0
    store_deadline_s: POSITIVE_SECONDS = 30.0
    drain_s: POSITIVE_SECONDS = 20.0
    enable_kv_events: bool = True
    locality: Literal["LOCAL", "REMOTE"] | None = None
    shared_prefixes: bool = True
    load_policy: Literal["auto", "always"] = "auto"
    adapters: Literal["bypass", "content"] = "bypass"
    weights: Literal["remembered", "full"] = "remembered"

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> Self:
        """Build the options from parsed JSON; unknown names and wrong types are refused by name.

        Raises:
            InvalidError: An option is unknown, missing, of the wrong type or out of range.
        """
        if not options.get("root"):
            raise InvalidError(
                "prefixstore needs a root: set kv_connector_extra_config to "
                '{"root": "/path/on/the/shared/filesystem"}'
            )
        try:
            return msgspec.convert(dict(options), cls)
        except msgspec.ValidationError as error:
            known = ", ".join(sorted({*cls.__struct_fields__, *VLLM_OPTIONS}))
            raise InvalidError(
                f"kv_connector_extra_config: {error}. Known options: {known}"
            ) from error

    def store_config(self, *, index_dir: str | None) -> StoreConfig:
        """Return the store's part, with ``index_dir`` where the user named none."""
        fields = {name: getattr(self, name) for name in StoreConfig.__struct_fields__}
        fields["index_dir"] = self.index_dir or index_dir
        return StoreConfig(**fields)

    def limits(self, payload_bytes: int, *, buffer_count: int | None = None) -> Limits:
        """Return the bounds of the I/O client for payloads of up to ``payload_bytes``.

        Args:
            payload_bytes: The largest payload.
            buffer_count: How many buffers; by default what ``buffers_bytes`` holds, but enough for all
                threads.
        """
        wanted = self.buffers_bytes // payload_bytes
        fewest = self.load_threads + self.store_threads
        return Limits(
            buffer_count=buffer_count or min(max(wanted, fewest), 64),
            buffer_bytes=payload_bytes,
            load_threads=self.load_threads,
            store_threads=self.store_threads,
            find_deadline_s=self.find_deadline_s,
            load_deadline_s=self.load_deadline_s,
            store_deadline_s=self.store_deadline_s,
            hang_s=2 * max(self.load_deadline_s, self.find_deadline_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """The memory that a CPU tier may be cut from.

    Totals, not what is free: every process of an engine must see the same.
    """

    total_bytes: int
    shared_bytes: int

    def default_cpu_bytes(self) -> int:
        """Size the CPU tier when the user does not."""
        return min(CPU_BYTES_LARGEST, self.total_bytes // 8, self.shared_bytes // 2)


def check_options(options: Mapping[str, Any]) -> TierOptions:
    """Check the options of the front door and return our part of them.

    Raises:
        InvalidError: An option is unknown, missing, of the wrong type or out of range.
    """
    ours = {name: value for name, value in options.items() if name not in VLLM_OPTIONS}
    if "namespace" in ours:
        raise InvalidError(
            "kv_connector_extra_config: 'namespace' is for vLLM's bare tiering only; "
            "PrefixStoreConnector works it out from the model"
        )
    checked = TierOptions.from_mapping(ours)
    meaningless = sorted(options.keys() & ((VLLM_OPTIONS - DIRECT_OPTIONS) | TIER_OPTIONS))
    if checked.mode == "direct" and meaningless:
        raise InvalidError(
            f"kv_connector_extra_config: mode=direct has no CPU tier, so {', '.join(meaningless)} "
            "would do nothing: leave it out, or use mode=tier"
        )
    return checked


def expand(options: Mapping[str, Any], *, machine: MachineMemory) -> dict[str, Any]:
    """Turn our options into vLLM's ``kv_connector_extra_config``.

    >>> memory = MachineMemory(total_bytes=2**36, shared_bytes=2**35)
    >>> expand({"root": "/kv"}, machine=memory)["spec_name"]
    'PrefixStoreSpec'

    Raises:
        InvalidError: An option is unknown, missing, of the wrong type or out of range.
    """
    if options.get("spec_name") == "PrefixStoreSpec":
        return dict(options)  # Expanded before, in this very process.
    check_options(options)
    passed = {name: value for name, value in options.items() if name in VLLM_OPTIONS}
    ours = {name: value for name, value in options.items() if name not in VLLM_OPTIONS}
    passed.setdefault("cpu_bytes_to_use", machine.default_cpu_bytes())
    return {
        **passed,
        "spec_name": "PrefixStoreSpec",
        "spec_module_path": "prefixstore.vllm.spec",
        "secondary_tiers": [
            {
                "type": "PrefixStoreTier",
                "module_path": "prefixstore.vllm.tier",
                FRONT_DOOR: True,
                **ours,
            }
        ],
    }
