"""What a worker says of its cache and its device, and what it leaves out."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.vllm.fingerprints import describe

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("config_settings")]


def test_fp8_of_another_bias_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices under one name and one dtype of cache, of which one biases FP8 otherwise, never share."""
    devices = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        monkeypatch.setattr(type(current_platform), "fp8_dtype", classmethod(lambda _, d=dtype: d))
        devices.append(describe(10).device)

    assert len(set(devices)) == 2, devices


def test_only_quantised_models_and_caches_care_for_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It decides to what precision their kernels compute; fleets of mixed devices share the rest."""
    cares: dict[tuple[bool, str], bool] = {
        (False, "auto"): False,
        (False, "bfloat16"): False,
        (True, "auto"): True,
        (False, "fp8"): True,
        (False, "turboquant_4bit_nc"): True,
    }
    devices: dict[tuple[bool, str], set[str]] = {kind: set() for kind in cares}
    for major in (9, 10):
        capability = DeviceCapability(major, 0)
        monkeypatch.setattr(
            type(current_platform), "get_device_capability", classmethod(lambda _, c=capability: c)
        )
        for (quantized, cache_dtype), found in devices.items():
            found.add(describe(10, quantized=quantized, cache_dtype=cache_dtype).device)

    assert cares == {kind: len(found) == 2 for kind, found in devices.items()}


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.LHBNC])
def test_the_number_of_blocks_is_no_part_of_a_workers_account(layout: KVCacheLayout) -> None:
    """In whatever order heads, blocks and tokens lie; that order is."""
    order = layout.layer_view_order

    assert describe(10, order=order) == describe(99, order=order)
    assert (describe(10) == describe(10, order=order)) is (layout is KVCacheLayout.LBHNC)
