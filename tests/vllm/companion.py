"""A connector of another make, for engines that run two: it loads and stores nothing by itself.

Its options make it do what prefixstore cannot live beside: ``handshake`` sends metadata of its own, and
``loads`` claims a prompt's first block.
"""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

BLOCK_TOKENS = 128


class CompanionConnector(KVConnectorBase_V1, SupportsHMA):
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return KVConnectorHandshakeMetadata() if self._option("handshake") else None

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int, bool]:
        claims = self._option("loads") and num_computed_tokens == 0
        return (BLOCK_TOKENS if claims and request.num_tokens > BLOCK_TOKENS else 0), False

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None: ...

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: "Request", block_ids: Any) -> tuple[bool, None]:
        return False, None

    def _option(self, name: str) -> bool:
        return bool(self._kv_transfer_config.get_from_extra_config(name, default=False))
