"""How jobs ended, in vLLM's words (vllm/v1/kv_offload/tiering/base.py, ``JobResult``)."""

from collections.abc import Mapping

from vllm.v1.kv_offload.base import OffloadKey
from vllm.v1.kv_offload.tiering.base import JobResult

from prefixstore.ioproc.jobs import LoadDone, StoreDone
from prefixstore.keys import Key

__all__ = ["load_result", "store_result"]


def load_result(done: LoadDone, originals: Mapping[Key, Key]) -> JobResult:
    """Tell which chunks landed.

    Args:
        done: The load.
        originals: vLLM's names of keys that the store knows by another.
    """
    return JobResult(
        job_id=done.ticket,
        success=not done.missed,
        successful_keys=[OffloadKey(originals.get(key, key)) for key in done.landed],
        transfer_time=done.elapsed_s,
        transfer_bytes=done.landed_bytes,
    )


def store_result(done: StoreDone) -> JobResult:
    """Tell whether all chunks are stored."""
    return JobResult(
        job_id=done.ticket,
        success=not done.skipped,
        transfer_time=done.elapsed_s,
        transfer_bytes=done.stored_bytes,
    )
