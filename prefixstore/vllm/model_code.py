"""What the code of a model says of itself: who it is, and which settings of the engine it reads.

Most models compute the same KV whatever the engine's limits are. A few read one: Llama 4 turns attention
temperature on by ``max_model_len`` and by its generation config. Which do is asked of the source of the
very version that runs, with all model code that it imports; a model whose source is not at hand counts
as one that reads them.

The same source tells whether token ids of the config go into KV (n-gram models cut their hashes at the end
of a text) or the tokenizer does, and whether weights are read from directories inside the model's.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.model_executor.models import registry
from vllm.model_executor.models.registry import ModelRegistry

__all__ = ["ModelCode", "find_code"]

PACKAGE = Path(registry.__file__).parents[2]
"""vLLM's own directory."""

MODEL_PACKAGES = ("vllm.model_executor.models.", "vllm.models.")
"""Where vLLM keeps models; imports from elsewhere are layers, whose choices are fields of their own."""

TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"
"""vLLM's frame around models whose code is the Transformers library's, or comes with the weights."""

IMPORT = re.compile(r"^\s*from\s+(\.*[\w.]*)\s+import\s+(\([^)]*\)|[^\n]*)", re.MULTILINE)
NAME = re.compile(r"\w+")
MODULES_MAX = 200
"""A model imports a dozen others; more is no model of vLLM's."""

NO_MODELS = frozenset({"adapters", "config", "registry"})
"""Modules beside the models that name many of them: wrappers for pooling, defaults, the table."""

HARMLESS_READS = {
    "deepseek_v2": (
        "self.max_model_len = vllm_config.model_config.max_model_len",
        "self.max_model_len,",
    )
}
"""Lines that read a setting and cannot change KV, by module: they size the sparse indexer's buffers. By
their very text, so that a version which reads it elsewhere as well is believed to need it."""

ENCODER_SIZES = frozenset({"get_encoder_cudagraph_budget_range", "get_max_frames_per_video"})
"""Functions that say how large the graphs of a picture's encoder get; what they read changes no KV."""

LENGTH = re.compile(r"max_model_len")
GENERATION = re.compile(r"generation_config")
TOKEN_IDS = re.compile(r"(?<!tokenizer\.)\b(?:bos|eos|pad)_token_id\b")
"""A tokenizer's own ids make prompts, whose tokens are in the keys."""
TOKENIZER = re.compile(r"model_config\.tokenizer\b")
FOLDERS = re.compile(
    r"""\ballow_patterns_overrides\s*=\s*\[(?:\s*["'][^"'/]*["'],)*\s*["'][^"'/]*/"""
    r"""|\bsubfolder\s*=|\bget_hf_file_bytes\("""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCode:
    """One model's code.

    Attributes:
        module: Where its class is; empty if nobody registered one.
        name: The class, with its module: an out-of-tree model may bear the name of one of vLLM's.
        reads_length: Whether it may read ``max_model_len``.
        reads_generation: Whether it may read the generation config.
        reads_token_ids: Whether it may compute with token ids of the model's config.
        reads_tokenizer: Whether it may compute with the model's tokenizer.
        reads_folders: Whether it may read weights from directories inside the model's.
    """

    module: str
    name: str
    reads_length: bool
    reads_generation: bool
    reads_token_ids: bool
    reads_tokenizer: bool
    reads_folders: bool

    @property
    def is_vllms(self) -> bool:
        """Whether vLLM's version tells what the code is."""
        return self.module.startswith("vllm.")

    @property
    def is_transformers(self) -> bool:
        """Whether the code is the Transformers library's, or the model's own, in vLLM's frame."""
        return self.module.startswith(TRANSFORMERS_BACKEND)


def find_code(architecture: str) -> ModelCode:
    """Look up the code that vLLM runs for a resolved architecture; imports no model."""
    entry: Any = ModelRegistry.models.get(architecture)
    model_class = getattr(entry, "model_cls", None)
    module = str(getattr(entry, "module_name", None) or getattr(model_class, "__module__", ""))
    name = getattr(entry, "class_name", None) or getattr(model_class, "__qualname__", architecture)
    sources = list(_sources(module)) if module.startswith(MODEL_PACKAGES) else []

    def may_read(pattern: re.Pattern[str]) -> bool:
        return not sources or any(pattern.search(source) for source in sources)

    return ModelCode(
        module=module,
        name=f"{module}:{name}",
        reads_length=may_read(LENGTH),
        reads_generation=may_read(GENERATION),
        reads_token_ids=may_read(TOKEN_IDS) or module.startswith(TRANSFORMERS_BACKEND),
        reads_tokenizer=may_read(TOKENIZER),
        reads_folders=may_read(FOLDERS),
    )


def _sources(module: str) -> Iterator[str]:
    """Yield the source of a module and of the model code that it imports, less what cannot matter."""
    waiting, seen = [module], {module}
    while waiting and len(seen) <= MODULES_MAX:
        name = waiting.pop()
        if (path := _find_file(name)) is None:
            continue
        source = _without_harmless(path.read_text(errors="replace"), module=path.stem)
        yield source
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imports(source, package):
            if imported in seen or imported.rpartition(".")[2] in NO_MODELS:
                continue
            if imported.startswith(MODEL_PACKAGES):
                seen.add(imported)
                waiting.append(imported)


def _find_file(module: str) -> Path | None:
    # By path: to find a module by its name imports the packages around it, and they their models.
    base = PACKAGE.joinpath(*module.split(".")[1:])
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return path if path.is_file() else None


def _without_harmless(source: str, *, module: str) -> str:
    """Return a source without the reads of settings that cannot change KV."""
    if LENGTH.search(source) and any(name in source for name in ENCODER_SIZES):
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name in ENCODER_SIZES:
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = ""
        source = "\n".join(lines)
    for harmless in HARMLESS_READS.get(module, ()):
        source = source.replace(harmless, "")
    return source


def _imports(source: str, package: str) -> Iterator[str]:
    """Yield the full names of what a module imports from; a name that is imported may be a module."""
    for match in IMPORT.finditer(source):
        base = _absolute(match[1], package)
        yield base
        for name in NAME.findall(match[2]):
            if _find_file(f"{base}.{name}") is not None:
                yield f"{base}.{name}"


def _absolute(name: str, package: str) -> str:
    """Return the full name of an import.

    >>> _absolute("..common.ops", "vllm.models.some.nvidia")
    'vllm.models.some.common.ops'
    """
    relative = name.lstrip(".")
    if (dots := len(name) - len(relative)) == 0:
        return name
    base = package.rsplit(".", dots - 1)[0] if dots > 1 else package
    return f"{base}.{relative}" if relative else base
