"""The real engine, offline and in this process, as ``driver`` uses it.

In this process, since only there the namespace and the state of the store can be asked for; workers of a model
that is divided between devices are processes of their own all the same.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.inputs import tokens_input

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import Fields
from prefixstore.vllm.connector import PrefixStoreConnector
from prefixstore.vllm.offline.driver import Computed

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

__all__ = ["OfflineEngine", "start_engine"]

OPEN_S = 1800.0
"""How long a store may take to open: the weights are read once to identify them, a few minutes for the largest
models on a shared filesystem."""
OPEN_LOOK_S = 0.1


def start_engine(args: "EngineArgs", options: Mapping[str, object]) -> LLM:
    """Start the engine with a root below it.

    Args:
        args: vLLM's own arguments.
        options: Those of ``kv_connector_extra_config``, checked.

    Raises:
        InvalidError: vLLM's arguments say something of a connector of their own.
    """
    if args.kv_transfer_config is not None:
        raise InvalidError("--kv-transfer-config is what `prefixstore prefill` sets: give --option")
    args.kv_transfer_config = KVTransferConfig(
        kv_connector="PrefixStoreConnector",
        kv_connector_module_path="prefixstore.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(options),
    )
    return LLM.from_engine_args(args)


class OfflineEngine:
    """An ``LLM`` in this process with our connector. Used by one thread."""

    def __init__(self, llm: LLM) -> None:
        """Take a started engine.

        Raises:
            InvalidError: It runs in another process, or with another connector.
        """
        self._engine = llm.llm_engine
        core = getattr(self._engine.engine_core, "engine_core", None)
        connector = getattr(getattr(core, "scheduler", None), "connector", None)
        if not isinstance(connector, PrefixStoreConnector):
            raise InvalidError(
                "the engine does not run in this process with PrefixStoreConnector: data parallel "
                "engines cannot prefill; leave --data-parallel-size and executor options out"
            )
        self._connector = connector
        self._sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._nudges = 0

    def open_store(self) -> Fields:
        """Wait until the store is on; return the namespace.

        Raises:
            UnavailableError: It is off, or does not open.
        """
        end_s = time.monotonic() + OPEN_S
        while time.monotonic() < end_s:
            state, reason = self._connector.store_state
            fields = self._connector.namespace_fields
            if state == "on" and fields is not None:
                return fields
            if state in ("off", "read_only") and not reason.startswith("the I/O process"):
                raise UnavailableError(f"the store is {state.replace('_', ' ')}: {reason}")
            time.sleep(OPEN_LOOK_S)
        raise UnavailableError(f"the store did not open within {OPEN_S:.0f} s: {reason}")

    def store_reason(self) -> str:
        """Say why the store does not store; empty if it does."""
        state, reason = self._connector.store_state
        return "" if state == "on" else f"the store is {state}: {reason}"

    @property
    def slots(self) -> int:
        """How many chunks the CPU tier has room for."""
        return self._connector.slots

    def add(self, request: str, tokens: Sequence[int]) -> None:
        """Queue a prompt; raises ValueError for one that the engine cannot take."""
        self._engine.add_request(request, tokens_input(list(tokens)), self._sampling)

    def step(self) -> list[Computed]:
        """Take one step; returns the prompts that are through."""
        return [
            Computed(
                # vLLM may add to the name that it was given, behind it.
                request=output.request_id,
                tokens=len(output.prompt_token_ids or ()),
                cached_tokens=output.num_cached_tokens or 0,
            )
            for output in self._engine.step()
            if output.finished
        ]

    def nudge(self) -> None:
        """Take a step though nothing is queued: what is being stored moves on only with steps."""
        self._nudges += 1
        # One token is no chunk, and is nobody's prompt.
        self.add(f"nudge-{self._nudges}", [0])
        while self._engine.has_unfinished_requests():
            self._engine.step()
