"""Who code outside vLLM is that computes KV: a plug-in's model, or its way to quantise.

A class's name proves as little as a model's. So the files of the package that the code is in are digested, as
weights are; what cannot be found is refused. Other packages that it imports are not looked at.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from prefixstore.errors import InvalidError
from prefixstore.vllm.weights import FILES_MAX, WeightDigests, refuse_changed

__all__ = ["digest_code"]

SUFFIXES = frozenset({".cpp", ".cu", ".cuh", ".h", ".py", ".so"})


def digest_code(module: str, *, digests: WeightDigests, loaded_since_s: float) -> str:
    """Return a digest of the code that a module is part of.

    That is all of its package; for a module that is in none, the Python files beside it.

    Raises:
        InvalidError: It cannot be found or read, or changed since it may have been imported.
    """
    package = _find(module.partition(".")[0], named=module)
    try:
        files = sorted(_files(package, module))
        found = [(name, digests.digest(path)) for name, path in files]
        refuse_changed((path for _, path in files), loaded_since_s)
        refuse_changed((path.resolve() for _, path in files), loaded_since_s)
    except OSError as error:
        raise InvalidError(f"cannot read the code of {module} to identify it: {error}") from error
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _files(package: ModuleSpec, module: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of some code, each with the name that it has wherever the code is installed."""
    own = _find(module, named=module).origin
    if package.submodule_search_locations is None:
        assert package.origin is not None, "found by its file"
        folder = Path(package.origin).parent
        yield from ((path.name, path) for path in folder.glob("*.py"))
        return
    is_complete = False
    for number, place in enumerate(package.submodule_search_locations):
        for count, path in enumerate(_walk(Path(place))):
            if count >= FILES_MAX:
                raise InvalidError(f"{place} holds over {FILES_MAX} files: not a package of models")
            is_complete |= str(path) == own
            yield f"{number}/{path.relative_to(place).as_posix()}", path
    if not is_complete:
        raise InvalidError(
            f"the code of {module} is not in its package's directory, so it cannot be identified: "
            "install it as a whole, or run without prefixstore"
        )


def _walk(folder: Path) -> Iterator[Path]:
    for inside, _, names in os.walk(folder):
        yield from (Path(inside, name) for name in names if Path(name).suffix in SUFFIXES)


def _find(name: str, *, named: str) -> ModuleSpec:
    """Return where a module is; looking does not import it, but may import the packages around it."""
    try:
        spec = importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or (spec.submodule_search_locations is None and not spec.has_location):
        raise InvalidError(
            f"the code of {named or 'the model'} cannot be found, so nothing names it: install it as a "
            "package, or run without prefixstore"
        )
    return spec
