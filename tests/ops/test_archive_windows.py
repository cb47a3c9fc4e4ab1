"""Windows and states lie in a root without their parents; they travel."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.config import StoreConfig
from prefixstore.keys import Fields, Key
from prefixstore.ops.export import export, select
from prefixstore.ops.importing import import_stream
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, chunk_at, payload_of

KEYS = chain("window", 6)
WINDOW = KEYS[3:]
"""The last three chunks of a chain of six; the first three are stored nowhere."""


def opener(root: str) -> Callable[[Fields], PrefixStore]:
    config = StoreConfig(direct_io="off")
    return lambda fields: PrefixStore.open(
        root, namespace=fields, config=config, index=None, background=False
    )


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    """Return an archive of a root that holds a window only."""
    out = io.BytesIO()
    with opener(f"{tmp_path}/root")(FIELDS) as store:
        for at in range(3, 6):
            store.store(chunk_at(KEYS, at), payload_of(KEYS[at]))
        store.reconcile()
        report = export(store, select(store), out)
    assert (report.chunks, report.errors) == (3, ())
    return out.getvalue()


def test_a_window_travels_without_what_comes_before_it(archive: bytes, tmp_path: Path) -> None:
    """Every chunk of it arrives, byte for byte."""
    report = import_stream(io.BytesIO(archive), opener(f"{tmp_path}/other"), name="archive")

    assert (report.chunks, report.imported) == (3, 3)
    one, other = (
        {path.name: path.read_bytes() for path in Path(f"{tmp_path}/{name}").rglob("*.kv")}
        for name in ("root", "other")
    )
    assert one == other
    assert {Key(bytes.fromhex(Path(name).stem)) for name in one} == set(WINDOW)
