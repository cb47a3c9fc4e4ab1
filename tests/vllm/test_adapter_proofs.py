"""Adapters by their content: what is proved of files that anybody may replace at any time."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest

from prefixstore.errors import InvalidError
from prefixstore.vllm import adapter_files, adapters
from prefixstore.vllm.adapter_files import AdapterFiles
from prefixstore.vllm.adapters import Adapters, AdapterUse, lora_settings
from prefixstore.vllm.weights import WeightDigests

SETTINGS = {"max_lora_rank": "16"}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files as settled that were written just now."""
    monkeypatch.setattr(adapter_files, "SETTLED_S", 0.0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Give an adapter's directory."""
    path = tmp_path / "sql"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def serve() -> Iterator[Callable[..., Adapters]]:
    """Give a function that makes the adapters of an engine; all are closed at the end."""
    made: list[Adapters] = []

    def make(*, capacity: int = 4, settings: dict[str, str] = SETTINGS) -> Adapters:
        made.append(Adapters(capacity=capacity, settings=settings, digests=WeightDigests(None)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def lora(path: Path, *, name: str = "sql", number: int = 1, **fields: Any) -> LoRARequest:
    """Say what vLLM says of an adapter."""
    return LoRARequest(name, number, str(path), **fields)


def prove(engine: Adapters, use: AdapterUse | None, *, patience_s: float = 30.0) -> bytes | None:
    """Wait for a proof and return what it told."""
    assert use is not None
    told: list[bytes | None] = []
    engine.prove(use, told.append, patience_s=patience_s)
    pause = threading.Event()
    while not told:
        pause.wait(0.001)
        engine.poll()
    (digest,) = told
    return digest


def replace_in_place(path: Path) -> None:
    """Write other weights of the same size into the same file, with the times that it had."""
    file = path / "adapter_model.safetensors"
    before = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_rename(path: Path) -> None:
    """Rename another file over the weights."""
    other = path.with_name("other.safetensors")
    other.write_bytes(b"WEIGHTS")
    other.rename(path / "adapter_model.safetensors")


def put_back(path: Path) -> None:
    """Take the weights away, and put the very file back."""
    file, aside = path / "adapter_model.safetensors", path.with_name("aside")
    file.rename(aside)
    aside.rename(file)


def swap_directory(path: Path) -> None:
    """Put a copy in the directory's place."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    path.rename(path.with_name("old"))
    copy.rename(path)


def add_file(path: Path) -> None:
    """Add a file that vLLM would read."""
    (path / "adapter_model.bin").write_bytes(b"more")


def remove_file(path: Path) -> None:
    """Remove the weights."""
    (path / "adapter_model.safetensors").unlink()


def remove_directory(path: Path) -> None:
    """Remove it all."""
    shutil.rmtree(path)


@pytest.mark.parametrize(
    "change",
    [
        replace_in_place,
        replace_by_rename,
        put_back,
        swap_directory,
        add_file,
        remove_file,
        remove_directory,
    ],
)
def test_any_change_of_the_files_is_seen(directory: Path, change: Callable[[Path], None]) -> None:
    """Even one that is undone: what was loaded in between could be anything."""
    files = AdapterFiles(directory)
    files.check()
    change(directory)

    with pytest.raises(InvalidError):
        files.check()


def test_a_link_that_is_turned_elsewhere_is_seen(directory: Path, tmp_path: Path) -> None:
    """Adapters are often named by a link to their newest version."""
    shutil.copytree(directory, tmp_path / "v2")
    link = tmp_path / "latest"
    link.symlink_to(directory)
    files = AdapterFiles(link)
    files.check()
    link.unlink()
    link.symlink_to(tmp_path / "v2")

    with pytest.raises(InvalidError, match="latest changed after the engine first used"):
        files.check()


@pytest.mark.parametrize("turned", ["stable", "current"])
def test_a_link_behind_a_link_that_is_turned_is_seen(
    directory: Path, tmp_path: Path, turned: str
) -> None:
    """One that the directory's link leads to, or one on the way of a file's own link."""
    shutil.copytree(directory, tmp_path / "v2")
    shutil.copytree(directory, tmp_path / "linked")
    weights = tmp_path / "linked" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "current" / "adapter_model.safetensors")
    (tmp_path / "current").symlink_to("sql")
    (tmp_path / "stable").symlink_to("linked")
    (tmp_path / "production").symlink_to("stable")
    files = AdapterFiles(tmp_path / "production")
    files.check()
    (tmp_path / turned).unlink()
    (tmp_path / turned).symlink_to("v2" if turned == "current" else "sql")

    with pytest.raises(InvalidError, match="changed after the engine first used"):
        files.check()


def test_reading_and_other_files_beside_the_directory_change_nothing(
    directory: Path, tmp_path: Path
) -> None:
    """What a worker does to load, and what others do next door, is no change."""
    files = AdapterFiles(directory)
    digests = WeightDigests(None)
    first = files.digest(digests)
    (directory / "adapter_model.safetensors").read_bytes()
    (tmp_path / "another").mkdir()

    assert {"adapter_config.json", "adapter_model.safetensors"} == first.keys()
    assert first == files.digest(digests)


def test_what_is_no_settled_adapter_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of a hub, a directory of something else, files written just now: each by its sentence."""
    with pytest.raises(InvalidError, match="no directory on this machine"):
        AdapterFiles(tmp_path / "org" / "name")
    with pytest.raises(InvalidError, match=r"holds no adapter_config\.json"):
        AdapterFiles(tmp_path)
    monkeypatch.setattr(adapter_files, "SETTLED_S", 3600.0)
    with pytest.raises(InvalidError, match="changed less than 3600 s before"):
        AdapterFiles(directory)


def test_engines_agree_on_a_content_and_its_settings(
    directory: Path, tmp_path: Path, serve: Callable[..., Adapters]
) -> None:
    """A copy elsewhere has the same digest; other weights, settings or reading have another."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    one = prove(serve(), serve().begin("r", lora(directory)))
    same = prove(serve(), serve().begin("r", lora(copy, name="other", number=7)))
    engine = serve(settings={"max_lora_rank": "32"})
    other_settings = prove(engine, engine.begin("r", lora(directory)))
    other_reading = prove(serve(), serve().begin("r", lora(directory, is_3d_lora_weight=True)))
    replace_in_place(directory)
    other_weights = prove(serve(), serve().begin("r", lora(directory)))

    assert one == same
    assert 4 == len({one, other_settings, other_reading, other_weights})


def test_the_first_request_loads_nothing_and_its_proof_lets_the_next_ones(
    directory: Path, serve: Callable[..., Adapters]
) -> None:
    """Before something was computed with it nobody can say what a worker holds."""
    engine = serve()
    first = engine.begin("r1", lora(directory))
    assert first is not None
    before = first.may_load
    assert prove(engine, first) is not None

    second = engine.begin("r2", lora(directory))

    assert not before
    assert second is not None
    assert second.may_load


def test_one_that_was_loaded_beforehand_loads_at_once(
    directory: Path, serve: Callable[..., Adapters]
) -> None:
    """As `--lora-modules` has it: told of before and after the load."""
    engine = serve()
    use = engine.mention(lora(directory))
    engine.loaded(use)
    assert prove(engine, use) is not None  # Proofs come in turn: the one above is done.

    request = engine.begin("r1", lora(directory))

    assert request is not None
    assert request.may_load


def test_a_replaced_adapter_passes_by_for_good(
    directory: Path, serve: Callable[..., Adapters], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is stored or loaded with it any more, though the files be put back; the log says so once."""
    engine = serve()
    use = engine.begin("r1", lora(directory))
    assert prove(engine, use) is not None
    backup = directory.with_name("backup")
    shutil.copytree(directory, backup)
    replace_in_place(directory)
    replaced = prove(engine, use)
    shutil.rmtree(directory)
    shutil.copytree(backup, directory)

    assert replaced is None
    assert engine.begin("r2", lora(directory)) is None
    assert engine.begin("r3", lora(directory, number=2)) is None
    assert 1 == caplog.text.count("passes the store by")


@pytest.mark.parametrize("again", ["another id", "in place"])
def test_an_adapter_loaded_anew_must_be_the_same(
    directory: Path, serve: Callable[..., Adapters], again: str
) -> None:
    """VLLM's own caches know it by name and path: of two contents nobody could tell the blocks apart."""
    engine = serve()
    assert prove(engine, engine.begin("r1", lora(directory))) is not None
    anew = (
        lora(directory, number=2) if again == "another id" else lora(directory, load_inplace=True)
    )

    same = engine.mention(anew)
    assert not same.may_load, "not before it is proved"
    assert prove(engine, same) is not None
    replace_by_rename(directory)
    changed = engine.mention(anew)

    assert prove(engine, changed) is None


def test_one_id_for_two_adapters_passes_both_by(
    directory: Path, tmp_path: Path, serve: Callable[..., Adapters]
) -> None:
    """A worker would compute the second with the weights of the first."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    engine = serve()
    assert engine.begin("r1", lora(directory)) is not None

    assert engine.begin("r2", lora(other, name="other")) is None
    assert engine.begin("r3", lora(directory)) is None


def test_an_id_may_name_another_adapter_once_the_first_was_removed(
    directory: Path, tmp_path: Path, serve: Callable[..., Adapters]
) -> None:
    """Its workers have dropped the first then."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    engine = serve()
    assert engine.begin("r1", lora(directory)) is not None
    engine.finish("r1")
    engine.removed(1)

    assert engine.begin("r2", lora(other, name="other")) is not None


def test_an_id_names_the_adapter_of_requests_that_run_though_it_was_removed(
    directory: Path, tmp_path: Path, serve: Callable[..., Adapters]
) -> None:
    """Their next step loads it again, and what comes under its id would be computed with it for good."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    engine = serve()
    use = engine.begin("r1", lora(directory))
    engine.removed(1)

    assert engine.begin("r2", lora(other, name="other")) is None
    engine.finish("r1")
    assert engine.begin("r3", lora(other, name="other")) is None
    assert prove(engine, use) is None


def test_an_adapter_that_waits_while_others_are_used_may_leave(
    directory: Path, tmp_path: Path, serve: Callable[..., Adapters]
) -> None:
    """A request that was not scheduled yet keeps nothing in the workers' memory; one that was does."""
    engine = serve(capacity=2)
    for number in (2, 3):
        shutil.copytree(directory, tmp_path / f"{number}")
    others = [lora(tmp_path / f"{number}", name=f"{number}", number=number) for number in (2, 3)]
    loaded = engine.mention(lora(directory))
    engine.loaded(loaded)
    assert prove(engine, loaded) is not None
    engine.loaded(engine.mention(others[0]))
    scheduled = engine.begin("r1", lora(directory))
    engine.scheduled("r1")
    engine.finish("r1")
    engine.loaded(engine.mention(others[1]))
    waits = engine.begin("r2", lora(directory))
    before = waits is not None and waits.may_load
    engine.loaded(engine.mention(others[0]))

    assert scheduled is not None
    assert before
    assert waits is not None
    assert not waits.may_load


def test_requests_that_load_at_every_step_pass_by(
    directory: Path, serve: Callable[..., Adapters]
) -> None:
    """With `load_inplace` in a request the worker reads the files at each of its steps."""
    assert serve().begin("r1", lora(directory, load_inplace=True)) is None


def test_a_hung_filesystem_costs_a_miss(
    directory: Path, serve: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that does not come in time proves nothing; later ones do, once it answers again."""
    answers = threading.Event()
    check = AdapterFiles.check
    monkeypatch.setattr(AdapterFiles, "check", lambda self: (answers.wait(), check(self))[1])
    engine = serve()
    use = engine.begin("r1", lora(directory))

    late = prove(engine, use, patience_s=0.01)
    answers.set()

    assert late is None
    assert not engine.busy
    assert prove(engine, use) is not None


def test_a_failing_filesystem_is_no_evidence(
    directory: Path, serve: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while looking is a miss for now, not for good."""
    engine = serve()
    use = engine.begin("r1", lora(directory))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterFiles, "check", lambda _self: _fail(OSError(5, "Input/output error")))
        failed = prove(engine, use)

    assert failed is None
    assert prove(engine, use) is not None


def test_without_a_thread_nothing_is_proved_until_there_is_one(
    directory: Path, serve: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have as many threads as it may; that is a miss, and over when it is over."""
    engine = serve()
    use = engine.begin("r1", lora(directory))
    assert use is not None
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda _self: _fail(RuntimeError("can't start new thread"))
        )
        engine.loaded(use)
        none = prove(engine, use)

    assert none is None
    assert not engine.busy
    assert not use.may_load_soon(0.0)
    assert prove(engine, use) is not None


def test_waiting_proofs_and_known_adapters_are_bounded(
    directory: Path, serve: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bounds nothing is proved, and nothing waits or is remembered."""
    monkeypatch.setattr(adapters, "WAITING_MAX", 0)
    monkeypatch.setattr(adapters, "ADAPTERS_MAX", 1)
    engine = serve()
    use = engine.begin("r1", lora(directory))

    assert prove(engine, use) is None
    assert engine.begin("r2", lora(directory, name="more", number=2)) is None


def test_only_capacities_are_left_out_of_the_settings() -> None:
    """How many adapters fit decides nothing of what one computes; all else may."""
    settings = lora_settings(LoRAConfig(max_loras=2, max_cpu_loras=8))

    assert {"max_lora_rank", "lora_dtype", "fully_sharded_loras"} < settings.keys()
    assert not settings.keys() & {"max_loras", "max_cpu_loras", "default_mm_loras"}
    assert settings == lora_settings(LoRAConfig(max_loras=4, max_cpu_loras=16))


def _fail(error: Exception) -> None:
    raise error
