"""Whose code computes KV: what vLLM's says of itself, and what names all other."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.model_executor.models.registry import ModelRegistry

from prefixstore.errors import InvalidError
from prefixstore.tree.root import diff_fields
from prefixstore.vllm.model_code import find_code
from tests.vllm.fingerprints import Change, engine_fields, on_transformers, set_in

# What vLLM and torch warn of while they build a config is not ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("config_settings")]


@pytest.mark.parametrize(
    ("architecture", "reads"),
    [
        ("LlamaForCausalLM", ()),
        ("Qwen3MoeForCausalLM", ()),
        ("DeepseekV3ForCausalLM", ()),
        ("Gemma3ForCausalLM", ()),
        # The length sizes the graphs of their encoders only.
        ("Qwen2_5_VLForConditionalGeneration", ()),
        ("InternVLChatModel", ()),
        ("Llama4ForCausalLM", ("length", "generation")),
        ("MiniMaxM2ForCausalLM", ("length",)),
        ("LongcatFlashNgramForCausalLM", ("token_ids",)),
        ("Qwen4ExpForCausalLM", ("token_ids",)),
        (
            "Olmo2ForCausalLM",
            ("token_ids",),
        ),  # On the Transformers backend, whose models nobody read.
        ("Cosmos3ForConditionalGeneration", ("folders",)),
        ("SomebodysOwnForCausalLM", ("length", "generation", "token_ids", "folders")),
    ],
)
def test_the_source_of_a_model_says_what_it_reads(
    architecture: str, reads: tuple[str, ...]
) -> None:
    """Only models that read the context length, say, have it in their namespace."""
    code = find_code(architecture)

    asked = ("length", "generation", "token_ids", "folders")
    assert reads == tuple(what for what in asked if getattr(code, f"reads_{what}"))


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a package that brings a model and its quantisation, known to vLLM."""
    package = tmp_path / "brought_along"
    (package / "ops").mkdir(parents=True)
    for name in ("__init__.py", "model.py", "ops/__init__.py", "ops/scale.py"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    entry = SimpleNamespace(module_name="brought_along.model", class_name="Own")
    monkeypatch.setitem(ModelRegistry.models, "OwnForCausalLM", entry)
    yield package
    for name in [name for name in sys.modules if name.startswith("brought_along")]:
        del sys.modules[name]


OWN = Change(name="", both=set_in("model_config", _architecture="OwnForCausalLM"))


def test_a_plug_ins_model_is_the_code_of_its_package(tiny_llama: Path, plug_in: Path) -> None:
    """A line changed anywhere in it is another model; files beside the code are not."""
    first = engine_fields(tiny_llama, OWN)
    (plug_in / "README.md").write_text("other")
    same = engine_fields(tiny_llama, OWN)
    (plug_in / "ops" / "scale.py").write_text("SCALE = 2")

    assert first == same
    assert ["libraries.model"] == names(diff_fields(first, engine_fields(tiny_llama, OWN)))


def test_a_module_of_no_package_is_the_code_beside_it(
    tiny_llama: Path, plug_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--model-class-overrides mymodels:Own` takes it from the directory at hand."""
    module = plug_in.parent / "lying_about.py"
    module.write_text("")
    entry = SimpleNamespace(module_name="lying_about", class_name="Own")
    monkeypatch.setitem(ModelRegistry.models, "OwnForCausalLM", entry)
    first = engine_fields(tiny_llama, OWN)
    (plug_in.parent / "imported_by_it.py").write_text("")

    assert ["libraries.model"] == names(diff_fields(first, engine_fields(tiny_llama, OWN)))


def test_a_plug_ins_code_that_changed_since_the_start_is_not_believed(
    tiny_llama: Path, plug_in: Path
) -> None:
    """What was imported may not be what lies there."""
    since_s = (plug_in / "model.py").stat().st_ctime - 60

    with pytest.raises(InvalidError, match=r"\.py changed after this engine's process began"):
        engine_fields(tiny_llama, OWN, loaded_since_s=since_s)


def test_a_plug_ins_quantisation_is_its_code(tiny_llama: Path, plug_in: Path) -> None:
    """What it makes of the weights' files is not vLLM's to say."""
    quantizer = type("Own", (), {"__module__": "brought_along.ops.scale"})()
    change = Change(
        name="", config=lambda config: object.__setattr__(config, "quant_config", quantizer)
    )
    first = engine_fields(tiny_llama, change)
    (plug_in / "model.py").write_text("SCALE = 2")

    assert ["libraries.quantization"] == names(
        diff_fields(first, engine_fields(tiny_llama, change))
    )


@pytest.mark.parametrize(
    ("auto_map", "is_refused"),
    [
        ({"AutoModel": "modeling.Own"}, False),
        ({"AutoModel": "org/name--modeling.Own"}, True),
        ({"AutoTokenizer": "org/name--tokenizing.Own"}, False),
    ],
)
def test_a_models_own_code_runs_from_its_directory_only(
    tiny_llama: Path, auto_map: dict[str, str], *, is_refused: bool
) -> None:
    """The Transformers backend takes code of a hub from its newest version, whatever revision is named."""
    change = Change(name="", config=on_transformers(auto_map=auto_map))

    if is_refused:
        with pytest.raises(InvalidError, match="download the model with its code"):
            engine_fields(tiny_llama, change)
    else:
        assert engine_fields(tiny_llama, change)["libraries"].keys() == {"transformers"}


def test_what_has_no_stable_text_is_refused(tiny_llama: Path) -> None:
    """A function's text holds its address, which is another in each process."""
    change = Change(name="", config=set_in("model_config", quantization_config=lambda: None))

    with pytest.raises(InvalidError, match="no stable text"):
        engine_fields(tiny_llama, change)


def names(differences: list[str]) -> list[str]:
    """Return the fields that differ."""
    return [line.partition(":")[0] for line in differences]
