"""Workers of the direct path on one root."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixstore.vllm.direct.device import Device, HostDevice
from tests.border.direct_rig import Rig


@pytest.fixture
def new_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Give a function that makes workers on one root, bound to an open store; all are closed."""
    rigs: list[Rig] = []

    def make(*, slots: int = 4, device: Device | None = None, **limits: Any) -> Rig:
        index = tmp_path / f"index-{len(rigs)}"
        rig = Rig(tmp_path / "root", index, slots=slots, device=device or HostDevice(), **limits)
        rigs.append(rig)
        rig.worker.bind(rig.client)
        rig.step_until(lambda: rig.worker.state == "on", "the store to open")
        return rig

    yield make
    for rig in rigs:
        rig.worker.close(2.0, last=[])
