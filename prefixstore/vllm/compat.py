"""Every place where vLLM's versions, or its private parts, matter to us.

Supported: 0.32 and 0.33. An unknown version gets a warning; a seam that is not there fails here, at
start-up and with a clear message, never while serving.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestGroupState,
)
from vllm.v1.kv_offload.base import OffloadKey, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.version import __version__ as version

from prefixstore.keys import Key

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

__all__ = [
    "SEAMS",
    "check_version",
    "find_loader",
    "forget_blocks",
    "missing_seams",
    "register_name",
    "registered_architecture",
    "release_region",
    "request_keys",
    "set_retention",
    "unname_region",
]

logger = logging.getLogger("prefixstore")

SUPPORTED = ("0.32", "0.33")
SEAMS: tuple[tuple[type, str], ...] = (
    (ReqContext, "_offload_key_positions"),
    (ReqContext, "get_offload_key_position"),
    (JobResult, "successful_keys"),
    (TransferJob, "req_context"),
    (TransferJob, "chunk_ids"),
    (ScheduleEndContext, "new_req_ids"),
    (SecondaryTierManager, "submit_load"),
    (SecondaryTierManager, "submit_store"),
    (SecondaryTierManager, "get_finished_jobs"),
    (TieringOffloadingManager, "reset_cache"),
    (RequestGroupState, "block_ids"),
)
"""What is read of vLLM beyond its public interfaces, or was renamed before."""
RETENTION = "prefix_cache_retention_interval"


def check_version() -> None:
    """Warn when the engine is one that prefixstore was not tried with."""
    if not version.startswith(tuple(f"{supported}." for supported in SUPPORTED)):
        logger.warning(
            "vLLM %s was never tried with prefixstore (%s were); watch its first requests",
            version,
            " and ".join(SUPPORTED),
        )


def missing_seams(seams: Sequence[tuple[type, str]] = ()) -> list[str]:
    """Name what prefixstore reads of vLLM's private parts and this vLLM does not have.

    Asked once at start: an engine where something is missing serves with the store off.
    """
    return [
        f"{owner.__name__}.{name}"
        for owner, name in seams or SEAMS
        if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", {})
    ]


def register_name(name: str, module: str) -> None:
    """Let vLLM find our connector by its name alone, as ``MultiConnector`` does for statistics."""
    if name not in KVConnectorFactory._registry:  # noqa: SLF001 - registering twice raises
        KVConnectorFactory.register_connector(name, module, name)


def find_loader(load_format: str) -> type | None:
    """Return the class that loads weights of a format: a plug-in may have put its own in the place of vLLM's."""
    from vllm.model_executor import model_loader

    loaders: dict[str, type] = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    return loaders.get(load_format)


def registered_architecture(model: Any) -> str:
    """Return the name under which the class of a model's architecture is registered.

    A classifier that is made of a model for generation goes by a name of its own.
    """
    normalize = getattr(model.registry, "_normalize_arch", None)
    name: str = model.architecture if normalize is None else normalize(model.architecture, model)
    return name


def request_keys(context: ReqContext, *, start: int = 0) -> Iterator[tuple[Key, int]]:
    """Yield the keys of a request with their end tokens, from the ``start``-th that was named.

    vLLM's scheduler notes each key of a request, whether it looks it up or not
    (offloading/scheduler.py, ``update_offload_keys``), but offers only a look-up by key.
    """
    positions: dict[OffloadKey, int] = context._offload_key_positions  # noqa: SLF001 - see above
    for key, end in itertools.islice(positions.items(), start, None):
        yield Key(key), end


def forget_blocks(scheduler: OffloadingConnectorScheduler, request_ids: Iterable[str]) -> None:
    """Have vLLM forget the blocks of requests that are scheduled as new: they come with their whole list.

    A session that goes on with new input does so a second time, and vLLM appends the list to what it has
    (offloading/scheduler.py, ``_update_req_states``): what it then stores is read from the wrong blocks.
    """
    for request_id in request_ids:
        for group in scheduler._req_status[request_id].group_states:  # noqa: SLF001 - see above
            group.block_ids.clear()


def set_retention(config: "VllmConfig", caches: "KVCacheConfig", interval: int) -> None:
    """Have vLLM keep windows and states at every multiple of ``interval`` tokens.

    The scheduler builds its connector before anything that reads these (v1/core/sched/scheduler.py,
    ``__init__``); a vLLM that names them otherwise keeps what it keeps by itself.
    """
    for owner in (config.cache_config, caches):
        if not hasattr(owner, RETENTION):
            logger.warning(
                "vLLM %s has no %s, so prompts that share a beginning may not hit",
                version,
                RETENTION,
            )
            return
    setattr(config.cache_config, RETENTION, interval)
    setattr(caches, RETENTION, interval)


def unname_region(region: "SharedOffloadRegion") -> None:
    """Remove the names in /dev/shm of a CPU tier that every process has mapped.

    The memory stays for as long as somebody maps it, so no way of dying leaks it. 0.32 has one file;
    0.33 cuts a large region into several, numbered behind the same name.
    """
    path = Path(region.mmap_path)
    for name in (path, *path.parent.glob(f"{path.name}.*")):
        name.unlink(missing_ok=True)
    region._creator = False  # noqa: SLF001 - its cleanup would remove the names once more


def release_region(region: "SharedOffloadRegion") -> None:
    """Unmap a worker's region; its name may have been removed by the scheduler's process."""
    if not Path(region.mmap_path).exists():
        region._creator = False  # noqa: SLF001 - its cleanup would complain of the missing name
    region.cleanup()
