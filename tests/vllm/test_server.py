"""The whole of it as users meet it: `prefixstore serve`, a real client, SIGKILL, the metrics page."""

import re
import urllib.request
from pathlib import Path

from tests.vllm import stores
from tests.vllm.conftest import StartServer
from tests.vllm.server import ApiServer, prefixstore_command
from tests.vllm.stores import LONG, OTHER, Place

MONITORING = Path(__file__).parents[2] / "docs/monitoring"
OPTIONS = {"cpu_bytes_to_use": stores.CPU_BYTES}


REPLICAS = [{"extra_headers": {"X-data-parallel-rank": str(rank)}} for rank in (0, 1)]
"""Has one replica of a server answer, and not the one with the least to do."""


def serves_from_store(server: ApiServer, replicas: int = 1) -> bool:
    """Tell whether every replica's store is on; metrics move only while an engine has something to do."""
    for replica in REPLICAS[:replicas]:
        server.complete([5], max_tokens=2, **replica)
    states = re.findall(r'vllm:prefixstore_state{engine="(\d)",.*,state="on"} 1.0', page(server))
    return states == [str(rank) for rank in range(replicas)]


def page(server: ApiServer) -> str:
    """Return the metrics page as Prometheus would read it."""
    with urllib.request.urlopen(server.url("/metrics"), timeout=30) as response:
        return str(response.read().decode())


def exported(server: ApiServer) -> set[str]:
    """Return the names of all metrics on the page, those that have counted nothing yet included."""
    lines = [line.split() for line in page(server).splitlines()]
    return {words[2] for words in lines if words[:2] == ["#", "TYPE"]}


def server_metrics_asked_for() -> set[str]:
    """Return the engines' metrics that the dashboard and the alerts of docs/monitoring query."""
    text = "".join(path.read_text() for path in MONITORING.glob("*.*") if path.suffix != ".md")
    return set(re.findall(r"\bvllm:[a-z_]+", text))


def test_a_server_of_two_replicas_answers_from_what_a_killed_server_stored(
    place: Place, tiny_llama: Path, start_server: StartServer
) -> None:
    """Its clients get the same text, nearly nothing is computed, and what one replica stores the other has."""
    arguments = (tiny_llama, place.root, "--dtype", "float32")
    env = {"XDG_CACHE_HOME": str(place.cache), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with start_server(prefixstore_command(*arguments, options=OPTIONS), env=env) as server:
        cold = server.complete(LONG)
        place.await_blobs(13)
        server.kill()

    command = prefixstore_command(*arguments, "--data-parallel-size", "2", options=OPTIONS)
    with start_server(command, env=env) as server:
        stores.until(lambda: serves_from_store(server, len(REPLICAS)), "both stores to be on")
        warm = [server.complete(LONG, **replica) for replica in REPLICAS]
        new = server.complete(OTHER, **REPLICAS[0])
        place.await_blobs(13 + 3)
        shared = server.complete(OTHER, **REPLICAS[1])
        metrics = server.metrics()
        queried = server_metrics_asked_for() - exported(server)

    assert queried == set()
    assert 0 == cold.cached_tokens == new.cached_tokens
    assert [13 * stores.BLOCK_TOKENS] * 2 == [answer.cached_tokens for answer in warm]
    assert 3 * stores.BLOCK_TOKENS == shared.cached_tokens
    assert [cold.text] * 2 == [answer.text for answer in warm]
    assert new.text == shared.text
    read_bytes = metrics["vllm:kv_offload_tiering_read_bytes_total"]
    assert (13 + 13 + 3) * stores.TINY_CHUNK_BYTES == read_bytes
    assert 13 + 13 + 3 <= metrics["vllm:kv_offload_tiering_chunk_hits_total"]
    assert 1 == len(list(place.root.glob("ns/*/manifest.json")))
