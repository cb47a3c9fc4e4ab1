"""Calls to the engine that change what it computes, told to whoever stores what it computed.

vLLM has no hook for them: adapters are loaded and weights replaced by calls that go straight from the
engine to its workers (vllm/v1/engine/core.py). So the class of the engine is wrapped, once in a process and
for all that listen, thinly: a call is told before and after, and goes on as it came.
"""

import functools
import logging
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

__all__ = ["ENGINE_SEAMS", "EngineListener", "listen_to_engine"]

logger = logging.getLogger("prefixstore")

ENGINE_SEAMS = ("add_lora", "remove_lora", "pin_lora", "collective_rpc")
"""What is wrapped of ``EngineCore``."""

READING_CALLS = frozenset(
    {
        "check_health",
        "compute_weight_checksums",
        "get_kv_cache_spec",
        "get_model_inspection",
        "list_loras",
        "profile",
        "release_late_interaction_query_cache",
        "synchronize_device",
        "update_max_model_len",
    }
)
"""Methods of workers that leave weights as they are. All others may replace them: ``reload_weights``, those
of a worker extension, functions that a caller sends."""


class EngineListener(Protocol):
    """Told of calls on the scheduler's thread; must not raise."""

    def adapter_loading(self, lora: "LoRARequest") -> Callable[[], None]:
        """Take note that workers are told to load an adapter; returns what to call once they have."""
        ...

    def adapter_removed(self, adapter_id: int) -> None:
        """Take note that workers were told to drop an adapter."""
        ...

    def adapter_pinned(self, adapter_id: int) -> None:
        """Take note that workers were told to keep an adapter."""
        ...

    def workers_called(self, method: str) -> None:
        """Take note that a method of the workers was called that may replace weights."""
        ...


# vLLM's class is one for the whole process, and so is what it is wrapped for. A process with two engines
# tells each of the other's calls as well: it then stores less than it could.
_listeners: "weakref.WeakSet[EngineListener]" = weakref.WeakSet()


def listen_to_engine(listener: EngineListener) -> list[str]:
    """Tell ``listener`` of calls for as long as it lives.

    Returns:
        What this vLLM does not have of ``ENGINE_SEAMS``; then nothing is told.
    """
    from vllm.v1.engine.core import EngineCore

    missing = [name for name in ENGINE_SEAMS if not hasattr(EngineCore, name)]
    if not missing:
        _listeners.add(listener)
        for name, tell in (
            ("add_lora", _tell_loading),
            ("remove_lora", _tell_removed),
            ("pin_lora", _tell_pinned),
            ("collective_rpc", _tell_called),
        ):
            _wrap(EngineCore, name, tell)
    return [f"EngineCore.{name}" for name in missing]


def _wrap(owner: type, name: str, tell: Callable[..., Callable[[], None] | None]) -> None:
    """Have ``tell`` called before a method of a class, and what it returns after; once."""
    original = getattr(owner, name)
    if getattr(original, "is_told", False):
        return

    @functools.wraps(original)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        after = tell(*args, **kwargs)
        result = original(self, *args, **kwargs)
        if after is not None:
            after()
        return result

    cast("Any", told).is_told = True
    setattr(owner, name, told)


def _tell_loading(lora_request: "LoRARequest") -> Callable[[], None]:
    loaded = [listener.adapter_loading(lora_request) for listener in list(_listeners)]

    def tell_loaded() -> None:
        for tell in loaded:
            tell()

    return tell_loaded


def _tell_removed(lora_id: int) -> None:
    for listener in list(_listeners):
        listener.adapter_removed(lora_id)


def _tell_pinned(lora_id: int) -> None:
    for listener in list(_listeners):
        listener.adapter_pinned(lora_id)


def _tell_called(method: object, *_args: Any, **_kwargs: Any) -> None:
    match method:
        case str():
            name = method
        case FunctionType():
            name = method.__qualname__
        case _:  # Anything that can be called; nothing of it is asked for that could fail.
            name = type(method).__qualname__
    if not isinstance(method, str) or method not in READING_CALLS:
        for listener in list(_listeners):
            listener.workers_called(name)
