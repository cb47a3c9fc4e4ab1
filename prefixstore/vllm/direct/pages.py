"""Where a chunk's bytes lie in a device's KV cache and in its payload: pure address arithmetic.

A **region** is one layer's KV cache; a block's **page** there is one dense run of bytes. The payload of
a chunk of ``n`` blocks, its layers in the order of the model:

    [layer 0: page of block 0 | ... | page of block n-1] [layer 1: ...] ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixstore.errors import InvalidError

if TYPE_CHECKING:
    import torch

    Addresses = np.ndarray[Any, np.dtype[np.int64]]

__all__ = ["Copies", "Pages", "Region", "find_regions", "join_copies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One layer's KV cache.

    Attributes:
        address: Where block 0 begins on the device.
        stride_bytes: From one block's page to the next.
        page_bytes: What one block owns there.
        blocks: How many there are.
    """

    address: int
    stride_bytes: int
    page_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Runs to copy between the device and a staging buffer, in either direction; equal lengths."""

    device: "Addresses"
    staging: "Addresses"
    lengths: "Addresses"


class Pages:
    """The regions of one worker, and where each page goes in a chunk's payload. Immutable."""

    def __init__(self, regions: Sequence[Region], *, blocks_per_chunk: int) -> None:
        assert regions, "a model has layers"
        self.blocks_per_chunk = blocks_per_chunk
        self.page_bytes = tuple(region.page_bytes for region in regions)
        self.payload_bytes = sum(self.page_bytes) * blocks_per_chunk
        self._blocks = min(region.blocks for region in regions)
        self._bases = np.array([region.address for region in regions], dtype=np.int64)
        self._strides = np.array([region.stride_bytes for region in regions], dtype=np.int64)
        self._lengths = np.array(self.page_bytes, dtype=np.int64)
        ends = np.cumsum(self._lengths * blocks_per_chunk)
        self._offsets = ends - self._lengths * blocks_per_chunk

    def copies(self, staging: int, blocks: Sequence[int], *, first: int = 0) -> Copies:
        """Pair pages of a chunk's blocks with their places in a staging buffer.

        Args:
            staging: The buffer's address; it holds ``payload_bytes``.
            blocks: Block ids of positions ``first``, ``first + 1``, ... of the chunk.
            first: The position of the first of them.
        """
        assert blocks, "a copy of nothing"
        assert 0 <= first <= self.blocks_per_chunk - len(blocks), (
            f"blocks {first} to {first + len(blocks)} of {self.blocks_per_chunk}"
        )
        assert 0 <= min(blocks) <= max(blocks) < self._blocks, f"{blocks} of {self._blocks} blocks"
        ids = np.asarray(blocks, dtype=np.int64)
        positions = np.arange(first, first + len(blocks), dtype=np.int64)
        device = self._bases[:, None] + self._strides[:, None] * ids
        places = staging + self._offsets[:, None] + self._lengths[:, None] * positions
        lengths = np.broadcast_to(self._lengths[:, None], device.shape)
        return Copies(device=device.ravel(), staging=places.ravel(), lengths=lengths.ravel())


def join_copies(parts: Sequence[Copies]) -> Copies:
    """Make one batch of several."""
    return Copies(
        device=np.concatenate([part.device for part in parts]),
        staging=np.concatenate([part.staging for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def find_regions(
    kv_caches: "Mapping[str, torch.Tensor]", layers: Sequence[str], *, blocks: int
) -> list[Region]:
    """Describe the caches of ``layers``, in their order.

    Kernels may cut a block into smaller ones: the first dimension then counts those.

    Raises:
        InvalidError: A block's bytes are not one run, so that a payload would hold bytes of others.
    """
    regions = []
    for name in layers:
        cache = kv_caches[name]
        if not hasattr(cache, "untyped_storage") or cache.shape[0] % blocks:
            raise InvalidError(
                f"mode=direct: the KV cache of {name} is no tensor of {blocks} blocks: use mode=tier"
            )
        element_bytes = cache.element_size()
        parts = cache.shape[0] // blocks
        shape, stride = [parts, *cache.shape[1:]], [*cache.stride()]
        elements, span = 1, 1
        for size, step in zip(shape, stride, strict=True):
            elements *= size
            span += (size - 1) * step
        if span != elements:
            raise InvalidError(
                f"mode=direct: a block of {name} is not one run of bytes (shape "
                f"{tuple(cache.shape)}, strides {tuple(cache.stride())}): use mode=tier"
            )
        regions.append(
            Region(
                address=cache.data_ptr(),
                stride_bytes=parts * stride[0] * element_bytes,
                page_bytes=elements * element_bytes,
                blocks=blocks,
            )
        )
    return regions
