"""The whole of it as users meet it: `prefixstore serve`, a real client, SIGKILL, the metrics page."""

import re
import urllib.request
from pathlib import Path

from tests.vllm import stores
from tests.vllm.conftest import StartServer
from tests.vllm.server import ApiServer, prefixstore_command
from tests.vllm.stores import LONG, Place

MONITORING = Path(__file__).parents[2] / "docs/monitoring"
OPTIONS = {"cpu_bytes_to_use": stores.CPU_BYTES}


def serves_from_store(server: ApiServer) -> bool:
    """Tell whether the store is on; metrics move only while the engine has something to do."""
    server.complete([5], max_tokens=2)
    return 'vllm:prefixstore_state{engine="0",model_name="test",state="on"} 1.0' in page(server)


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


def test_a_server_answers_from_what_a_killed_one_stored(
    place: Place, tiny_llama: Path, start_server: StartServer
) -> None:
    """The second server's client gets the same text, and nearly all of the prompt was not computed."""
    command = prefixstore_command(tiny_llama, place.root, "--dtype", "float32", options=OPTIONS)
    env = {"XDG_CACHE_HOME": str(place.cache)}
    with start_server(command, env=env) as server:
        cold = server.complete(LONG)
        place.await_blobs(13)
        server.kill()

    with start_server(command, env=env) as server:
        stores.until(lambda: serves_from_store(server), "the store to be on")
        warm = server.complete(LONG)
        second = server.complete(LONG[:1000])
        metrics = server.metrics()
        queried = server_metrics_asked_for() - exported(server)

    assert queried == set()
    assert 0 == cold.cached_tokens
    assert 13 * stores.BLOCK_TOKENS == warm.cached_tokens
    assert cold.text == warm.text
    assert second.prompt_tokens == 1000
    assert 13 * stores.TINY_CHUNK_BYTES == metrics["vllm:kv_offload_tiering_read_bytes_total"]
    assert 13 <= metrics["vllm:kv_offload_tiering_chunk_hits_total"]
