"""What the code of a model says of itself: who it is, and which settings of the engine it reads.

Most models compute the same KV whatever the engine's limits are. A few read one: Llama 4 turns attention
temperature on by ``max_model_len`` and by its generation config. Which do is asked of the source of the
very version that runs, with all model code that it imports; a model whose source is not at hand counts
as one that reads them.
"""

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

IMPORT = re.compile(r"^\s*from\s+(\.*[\w.]*)\s+import\s", re.MULTILINE)
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

LENGTH = "max_model_len"
GENERATION = "generation_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCode:
    """One model's code.

    Attributes:
        name: The class, with its module: an out-of-tree model may bear the name of one of vLLM's.
        reads_length: Whether it may read ``max_model_len``.
        reads_generation: Whether it may read the generation config.
    """

    name: str
    reads_length: bool
    reads_generation: bool


def find_code(architecture: str) -> ModelCode:
    """Look up the code that vLLM runs for a resolved architecture; imports no model."""
    entry: Any = ModelRegistry.models.get(architecture)
    model_class = getattr(entry, "model_cls", None)
    module = str(getattr(entry, "module_name", None) or getattr(model_class, "__module__", ""))
    name = getattr(entry, "class_name", None) or getattr(model_class, "__qualname__", architecture)
    sources = list(_sources(module)) if module.startswith(MODEL_PACKAGES) else []
    return ModelCode(
        name=f"{module}:{name}",
        reads_length=not sources or any(LENGTH in source for source in sources),
        reads_generation=not sources or any(GENERATION in source for source in sources),
    )


def _sources(module: str) -> Iterator[str]:
    """Yield the source of a module and of the model code that it imports."""
    waiting, seen = [module], {module}
    while waiting and len(seen) <= MODULES_MAX:
        name = waiting.pop()
        # By path: to find a module by its name imports the packages around it, and they their models.
        base = PACKAGE.joinpath(*name.split(".")[1:])
        is_package = base.is_dir()
        path = base / "__init__.py" if is_package else base.with_suffix(".py")
        if not path.is_file():
            continue
        source = path.read_text(errors="replace")
        for harmless in HARMLESS_READS.get(base.name, ()):
            source = source.replace(harmless, "")
        yield source
        package = name if is_package else name.rpartition(".")[0]
        for match in IMPORT.finditer(source):
            imported = _absolute(match[1], package)
            if imported in seen or imported.rpartition(".")[2] in NO_MODELS:
                continue
            if imported.startswith(MODEL_PACKAGES):
                seen.add(imported)
                waiting.append(imported)


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
