"""The dashboard, the alerts and the page about them name what is really exported."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client import Metric

from prefixstore.ops.exporter import RootExporter
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, store_chain

DOCS = Path(__file__).parents[2] / "docs/monitoring"
OURS = re.compile(r"\bprefixstore_[a-z_]+")
ENGINES = re.compile(r"\bvllm:[a-z_]+")


def queries() -> list[str]:
    """Return every query of the dashboard and of the alerts."""
    board = json.loads((DOCS / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = re.findall(r"^ +expr: (.+)$", (DOCS / "alerts.yaml").read_text(), re.MULTILINE)
    return asked + rules


@pytest.fixture
def exported(tmp_path: Path) -> set[str]:
    """Return the names on a root's page, as Prometheus stores them."""
    with PrefixStore.open(
        f"{tmp_path}/root", namespace=FIELDS, index=None, background=False
    ) as store:
        store_chain(store, chain("a", 1))
        exporter = RootExporter(store)
        exporter.look()
        return {_name(family) for family in exporter.collect()}


def test_every_query_names_what_a_root_exports(exported: set[str]) -> None:
    """A renamed metric leaves no panel empty and no alert asleep."""
    asked = [name for query in queries() for name in _ours(query)]

    assert len(asked) > 20
    assert set(asked) - exported == set()


def test_the_page_tells_of_every_metric(exported: set[str]) -> None:
    """Nothing is exported that is not explained, nothing explained that is not exported."""
    table = [line for line in (DOCS / "README.md").read_text().splitlines() if line[:1] == "|"]

    assert set(OURS.findall("\n".join(table))) == exported


def test_engines_metrics_are_those_that_vllm_md_lists() -> None:
    """Of the engines' own pages nothing is asked that the page on vLLM does not tell of."""
    told = (DOCS.parent / "vllm.md").read_text()
    asked = {name for query in queries() for name in ENGINES.findall(query)}

    assert len(asked) == 5
    assert [name for name in asked if name.removesuffix("_total") not in told] == []


def _ours(query: str) -> list[str]:
    """Return the names of a root's metrics in a query, leaving out those of the engines."""
    return OURS.findall(ENGINES.sub("", query))


def _name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name
