"""What every engine test shares: the marker, the models, started engines, their logs on failure."""

import importlib.util
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.vllm import models
from tests.vllm.engine import Engine, EngineConfig, ForkServer, fork_server
from tests.vllm.server import ApiServer
from tests.vllm.stores import CHUNKS, CPU_BYTES, FLOAT32, PROMPTS, Place, Reference, until

if TYPE_CHECKING:
    from tests.vllm.schedulers import Machine, NewMachine

HERE = Path(__file__).parent
LOGS = pytest.StashKey[list[Path]]()

StartEngine = Callable[..., Engine]
StartServer = Callable[..., ApiServer]
NewPlace = Callable[..., Place]

# Without the engine a plain `pytest` still runs everything else.
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the whole directory: whatever lies here runs the engine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            # Engines, servers and mounts in real time on whatever machine this is: what fails twice
            # fails, and what fails once is told as a rerun.
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the engine logs of a failed test under its traceback."""
    report = yield
    if report.failed:
        for log in item.stash.get(LOGS, []):
            report.sections.append((f"engine log {log.name}", log.read_text(errors="replace")))
    return report


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Give the process that has imported vLLM; engines forked from it start in seconds."""
    with fork_server(log=tmp_path_factory.mktemp("fork-server") / "fork-server.log") as server:
        yield server


@pytest.fixture
def config_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give vLLM what it needs to build a config here, and no seed of the surroundings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@pytest.fixture
def new_log(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Give a function that names a fresh log file, shown if the test fails."""
    logs = request.node.stash.setdefault(LOGS, [])

    def name(stem: str) -> Path:
        log = tmp_path / f"{stem}-{len(logs)}.log"
        log.touch()
        logs.append(log)
        return log

    return name


@pytest.fixture
def start_engine(
    new_log: Callable[[str], Path], request: pytest.FixtureRequest
) -> Iterator[StartEngine]:
    """Give a function that starts engines; those still running at the test's end are killed.

    In-process engines are forked from the preloaded parent, multiprocess ones get a fresh
    interpreter: they are there to be as close to production as a test can be. `fresh=True` asks
    for the fresh interpreter with an in-process engine too.
    """
    started: list[Engine] = []

    def start(
        model: Path, *, multiprocess: bool = False, fresh: bool = False, **fields: Any
    ) -> Engine:
        config = EngineConfig(model=model, multiprocess=multiprocess, **fields)
        server = None if fresh or multiprocess else request.getfixturevalue("forks")
        engine = Engine.start(config, log=new_log("engine"), server=server)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def new_machine(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Iterator[NewMachine]":
    """Give a function that makes engines without a model on one root; all are closed.

    Each waits until its store is in a state, on unless said otherwise.
    """
    from tests.vllm.schedulers import MODES, Machine

    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # This process may be older than the model, which an engine's process never is.
    monkeypatch.setattr("prefixstore.vllm.fingerprint.process_start_s", time.time)
    machines: list[Machine] = []

    def make(
        mode: str = "tier",
        *,
        options: Mapping[str, Any] | None = None,
        state: str = "on",
        **fields: Any,
    ) -> "Machine":
        given = {"root": str(tmp_path / "root"), "miss_ttl_s": 0.001, **MODES[mode]}
        machine = Machine(tiny_llama, {**given, **(options or {})}, **fields)
        machines.append(machine)
        machine.await_state(state)
        return machine

    yield make
    for machine in machines:
        machine.close()


@dataclass(frozen=True, slots=True)
class StartWithFiles:
    """Starts engines with vLLM's own file tier, always on one directory: what others would answer."""

    directory: Path
    start: StartEngine

    def __call__(self, model: Path, llm: Mapping[str, Any] = FLOAT32, **fields: Any) -> Engine:
        """Start one."""
        extra = {
            # vLLM's own spec, but for the worker: it has none for CPU platforms.
            "spec_name": "PrefixStoreSpec",
            "spec_module_path": "prefixstore.vllm.spec",
            "cpu_bytes_to_use": CPU_BYTES,
            "secondary_tiers": [{"type": "fs", "root_dir": str(self.directory)}],
        }
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        return self.start(model, llm={**llm, "kv_transfer_config": transfer}, **fields)

    def await_files(self, count: int) -> None:
        """Wait until so many chunks lie there."""
        until(lambda: len(list(self.directory.rglob("*.bin"))) >= count, "vLLM's files")


@pytest.fixture
def start_with_files(start_engine: StartEngine, tmp_path: Path) -> StartWithFiles:
    """Give a function that starts engines with vLLM's own file tier on one new directory."""
    return StartWithFiles(tmp_path / "files", start_engine)


@pytest.fixture
def start_server(new_log: Callable[[str], Path]) -> Iterator[StartServer]:
    """Give a function that starts API servers; those still running at the test's end are killed."""
    started: list[ApiServer] = []

    def start(command: Sequence[str], **options: Any) -> ApiServer:
        server = ApiServer.start(command, log=new_log("server"), **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Give the tiny Llama: one group of full attention."""
    return models.tiny("llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Give SmolLM2-135M-Instruct."""
    return models.smollm2()


@pytest.fixture
def new_place(start_engine: StartEngine, tmp_path: Path) -> NewPlace:
    """Give a function that makes places: a machine each, by default all on one new root."""
    names = itertools.count()

    def make(*, root: Path | None = None, **options: Any) -> Place:
        return Place(
            root=root or tmp_path / "root",
            cache=tmp_path / f"cache-{next(names)}",
            start=start_engine,
            options=options,
        )

    return make


@pytest.fixture
def place(new_place: NewPlace) -> Place:
    """Give one machine on a new root."""
    return new_place()


@pytest.fixture(scope="session")
def alone(
    tiny_llama: Path, forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Give what the tiny Llama answers to the prompts without any store: cold, then from memory."""
    config = EngineConfig(model=tiny_llama, llm=FLOAT32)
    log = tmp_path_factory.mktemp("alone") / "engine.log"
    with Engine.start(config, log=log, server=forks) as engine:
        cold = engine.generate_each(PROMPTS, logprobs=1)
        assert engine.reset_prefix_cache()
        engine.generate_each(PROMPTS)
        own_hit = engine.generate_each(PROMPTS, logprobs=1)
    return Reference(cold=cold, own_hit=own_hit)


@pytest.fixture(scope="session")
def filled_root(
    tiny_llama: Path, forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give a root that holds all chunks of the prompts; never touched, tests copy it."""
    directory = tmp_path_factory.mktemp("filled")

    def start(model: Path, **fields: Any) -> Engine:
        config = EngineConfig(model=model, **fields)
        return Engine.start(config, log=directory / "engine.log", server=forks)

    place = Place(root=directory / "root", cache=directory / "cache", start=start)
    with place.engine(tiny_llama) as engine:
        engine.generate_each(PROMPTS)
        place.await_blobs(CHUNKS)
    return place.root


@pytest.fixture
def filled(filled_root: Path, new_place: NewPlace) -> Place:
    """Give one machine on a copy of the root that holds all chunks of the prompts."""
    place = new_place()
    shutil.copytree(filled_root, place.root)
    return place


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Give a function that drives a manager on the test's root; all are shut down at the end."""
    from tests.vllm.managers import Driver, make_config

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drivers: list[Driver] = []

    def make(*, slots: int = 64, **settings: Any) -> Driver:
        engine = f"test-{os.getpid()}-{len(drivers)}"
        driver = Driver(make_config(tmp_path / "root", slots=slots, engine=engine, **settings))
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.manager.shutdown()
