"""What Prometheus reads of a root: what is there now, and what its writers wrote down."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from prefixstore.config import StoreConfig
from prefixstore.ops.exporter import RootExporter
from prefixstore.store import PrefixStore
from prefixstore.store.history import INTERVAL_S
from prefixstore.testing.chains import FIELDS, FILE_BYTES, RAW_BYTES, chain, load, store_chain
from prefixstore.testing.clock import ManualClock

KEYS = chain("a", 4)


@pytest.fixture
def clock() -> ManualClock:
    """Return the clock of the writer."""
    return ManualClock()


@pytest.fixture
def writer(tmp_path: Path, clock: ManualClock) -> Iterator[PrefixStore]:
    """Return an engine's store."""
    config = StoreConfig(direct_io="off")
    with PrefixStore.open(
        f"{tmp_path}/root",
        namespace=FIELDS,
        config=config,
        index=None,
        background=False,
        clock=clock,
    ) as store:
        yield store


@pytest.fixture
def exporter(writer: PrefixStore) -> Iterator[RootExporter]:
    """Return an exporter of the same root, in a process of its own for all that the store knows."""
    config = StoreConfig(direct_io="off", read_only=True)
    with PrefixStore.open(writer.root.path, config=config, index=None, create=False) as store:
        yield RootExporter(store)


def page(exporter: RootExporter) -> dict[str, float]:
    """Return what a scrape would see, without the namespace's id."""
    registry = CollectorRegistry()
    registry.register(exporter)
    text = generate_latest(registry).decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: v for name, v in sample.labels.items() if name != "namespace"}
            values[" ".join([sample.name, *labels.values()])] = sample.value
    return values


def record(writer: PrefixStore, clock: ManualClock) -> None:
    """Have the writer write down what it counted."""
    clock.advance(INTERVAL_S)
    writer.work()


def test_what_is_there_now_is_told(exporter: RootExporter, writer: PrefixStore) -> None:
    """Chunks and bytes of each namespace, as they lie on disk and decoded."""
    store_chain(writer, KEYS)
    exporter.look()
    seen = page(exporter)

    assert seen["prefixstore_root_up"] == 1
    assert seen["prefixstore_namespace_chunks"] == 4
    assert seen["prefixstore_namespace_file_bytes"] == 4 * FILE_BYTES
    assert seen["prefixstore_namespace_raw_bytes"] == 4 * RAW_BYTES


def test_counters_begin_at_the_first_look(
    exporter: RootExporter, writer: PrefixStore, clock: ManualClock
) -> None:
    """What happened before is no burst of now; what happens after is added up."""
    store_chain(writer, KEYS)
    record(writer, clock)
    exporter.look()
    assert page(exporter)["prefixstore_stored_chunks_total"] == 0

    load(writer, KEYS[0])
    load(writer, chain("missing", 1)[0])
    record(writer, clock)
    exporter.look()
    seen = page(exporter)
    assert seen["prefixstore_stored_chunks_total"] == 0
    assert seen["prefixstore_loaded_chunks_total"] == 1
    assert seen["prefixstore_load_misses_total absent"] == 1


def test_a_counter_never_goes_back(
    exporter: RootExporter, writer: PrefixStore, clock: ManualClock
) -> None:
    """History that was removed for its age takes nothing away."""
    exporter.look()
    store_chain(writer, KEYS)
    record(writer, clock)
    exporter.look()
    for path in Path(writer.root.layout.history).iterdir():
        path.unlink()
    exporter.look()

    assert page(exporter)["prefixstore_stored_chunks_total"] == 4


def test_a_root_that_is_away_is_not_up(exporter: RootExporter, writer: PrefixStore) -> None:
    """The page is served all the same, with what was seen last."""
    store_chain(writer, KEYS)
    exporter.look()
    root = Path(writer.root.path)
    away = root.rename(root.with_name("away"))
    exporter.look()
    seen = page(exporter)
    away.rename(root)

    assert seen["prefixstore_root_up"] == 0
    assert seen["prefixstore_namespace_chunks"] == 4
