"""Who the weights are: a resolved commit, or a digest of the very files.

A name proves nothing: the files behind it are replaced, a branch moves on. A local directory is
identified by the XXH3-128 of each file that can hold weights or says how to read them (and of its code,
where code from the directory runs); digests are remembered by the file's inode, size and times, so that an
unchanged model costs a few stats.

An engine can only be asked once its model is loaded. So files that changed after its process began may
be others than it loaded, and are refused; the kernel's change time tells, which nobody can set.
"""

import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from prefixstore.errors import InvalidError

__all__ = [
    "SETTLED_S",
    "WeightDigests",
    "WeightSource",
    "identify_weights",
    "links_to",
    "process_start_s",
    "refuse_changed",
]

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
CODE_SUFFIXES = frozenset({".py"})
READING_ENDS = (
    ".index.json",
    "quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
)
"""How the names end of files that say which weights are read and how they are quantised
(vllm/model_executor/model_loader/weight_utils.py, ``filter_duplicate_safetensors_files`` and
``get_quant_config``). All else that vLLM reads of a directory is in the config that it makes of it."""
MERGED_ADAPTER = "adapter_config.json"
"""Says how an adapter inside the model's directory is scaled before it is added to the weights (Jina)."""
TOKENIZER_STARTS = ("added_tokens", "merges", "special_tokens", "tekken", "tokenizer", "vocab")
TOKENIZER_SUFFIXES = frozenset({".model", ".tiktoken"})
"""How the names of a tokenizer's files begin or end, for models that compute with it."""
FILES_MAX = 10_000
READ_BYTES = 8 * 2**20
REMEMBERED_MAX = 10_000
"""Digests kept in the memory's file, the newest: some 1 MB. A forgotten one is taken again."""
SETTLED_S = 2.0
"""A file this fresh may change once more within its times' granularity (2 s on the coarsest
filesystem), so its digest is not remembered."""
COMMIT = re.compile(r"[0-9a-f]{40}")
LINKS_MAX = 40
"""Symbolic links on the way to a file: as many as Linux follows."""


class WeightDigests:
    """Digests of large files, remembered in one small JSON file. Not thread-safe.

    The memory is a hint keyed by what the kernel says of a file; a file rewritten in place with its
    size, inode and both times unchanged is beyond it. ``full`` reads every file every time.
    """

    def __init__(self, remembered: Path | None, *, full: bool = False) -> None:
        self._path = remembered
        self._full = full
        self._known: dict[str, str] = {}
        if remembered is not None and not full:
            try:
                self._known = msgspec.json.decode(remembered.read_bytes(), type=dict[str, str])
            except (msgspec.DecodeError, OSError):
                self._known = {}

    def digest(self, path: Path) -> str:
        """Return the hex XXH3-128 of a file's content.

        Raises:
            InvalidError: The file changed while it was read.
            OSError: The file cannot be read.
        """
        stat = path.stat()
        identity = _identity(stat)
        if (known := self._known.get(identity)) is not None:
            return known
        hasher = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                hasher.update(piece)
        if _identity(path.stat()) != identity:
            raise InvalidError(
                f"{path} changed while it was read to identify it: restart the engine once the "
                "weights are in their place"
            )
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_S:
            self._known[identity] = hasher.hexdigest()
            self._remember()
        return hasher.hexdigest()

    def _remember(self) -> None:
        if self._path is None or self._full:
            return
        newest = dict(list(self._known.items())[-REMEMBERED_MAX:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_bytes(msgspec.json.encode(newest))
            temporary.replace(self._path)
        except OSError:
            return  # The digest is right all the same; the next start reads the weights again.


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where an engine took its weights from.

    Attributes:
        model: A local directory or file, or the name of a model on a hub.
        revision: The revision asked for, if any.
        config_commit: The commit that the model's config came from, if it came from a hub.
        hub_cache: The directory of the hub's cache; None for the usual one.
        runs_code: Whether code from the model's directory runs (``trust_remote_code``).
        reads_folders: Whether the model may read weights from directories inside its own.
        reads_tokenizer: Whether the model may compute with the tokenizer in its directory.
        loaded_since_s: The earliest moment at which the weights may have been read, in seconds since
            the epoch.
    """

    model: str
    revision: str | None = None
    config_commit: str | None = None
    hub_cache: str | None = None
    runs_code: bool = False
    reads_folders: bool = False
    reads_tokenizer: bool = False
    loaded_since_s: float


def identify_weights(source: WeightSource, *, digests: WeightDigests) -> Mapping[str, object]:
    """Return what names the weights beyond doubt.

    Raises:
        InvalidError: The weights are neither local nor of a known commit, or may have been replaced
            while the engine started.
    """
    path = Path(source.model)
    if not path.exists():
        return {"repository": source.model, "commit": _resolved_commit(source)}
    try:
        return _identify_directory(path, source, digests=digests)
    except OSError as error:
        raise InvalidError(f"cannot read the weights to identify them: {error}") from error


def _identify_directory(
    path: Path, source: WeightSource, *, digests: WeightDigests
) -> Mapping[str, object]:
    links = links_to(path)
    resolved = path.resolve()
    if COMMIT.fullmatch(resolved.name) and resolved.parent.name == "snapshots":
        refuse_changed(links, source.loaded_since_s)
        return {"repository": _repository(resolved.parent.parent.name), "commit": resolved.name}
    files = [resolved] if resolved.is_file() else sorted(_files(resolved, source))
    if not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        raise InvalidError(
            f"{resolved} holds no weights ({', '.join(sorted(WEIGHT_SUFFIXES))}): serve a directory "
            "that does, or a model of the hub with --revision COMMIT"
        )
    base = resolved.parent if resolved.is_file() else resolved
    ways = {entry for file in files for entry in _way_to(file)}
    found = {file.relative_to(base).as_posix(): digests.digest(file) for file in files}
    # Looked at last: what changes from here on is loaded by a later engine only.
    refuse_changed([*links, resolved, *sorted(ways)], source.loaded_since_s)
    return {"files": found}


def refuse_changed(entries: Iterable[Path], since_s: float) -> None:
    """Raise if anything may be other than what was loaded: it changed since then.

    Raises:
        InvalidError: Something has changed.
        OSError: Something cannot be looked at.
    """
    for entry in entries:
        if entry.lstat().st_ctime > since_s:
            raise InvalidError(
                f"{entry} changed after this engine's process began, so what it loaded may be other "
                "than what lies there now: restart the engine to use the store"
            )


def _way_to(file: Path) -> Iterator[Path]:
    """Yield a file with all whose change may put another in its place."""
    target = file.resolve()
    yield from (*links_to(file), file.parent, target.parent, target)


def process_start_s() -> float:
    """Return when this process began, in seconds since the epoch."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): the 22nd field
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)


def _files(directory: Path, source: WeightSource) -> Iterator[Path]:
    """Yield the files that vLLM's loaders may read, bounded."""
    suffixes = WEIGHT_SUFFIXES | (CODE_SUFFIXES if source.runs_code else frozenset())
    count = 0
    for folder, inside, names in os.walk(directory, followlinks=True, onerror=_raise):
        if not source.reads_folders:
            inside.clear()
        count += len(names) + len(inside)
        if count > FILES_MAX:
            raise InvalidError(f"{directory} holds over {FILES_MAX} files: not a model's directory")
        for name in names:
            path = Path(folder, name)
            decides = path.suffix in suffixes or name.endswith(READING_ENDS)
            decides |= source.reads_folders and name == MERGED_ADAPTER
            decides |= source.reads_tokenizer and _is_tokenizers(path)
            if decides and path.is_file():
                yield path


def _is_tokenizers(path: Path) -> bool:
    return path.name.startswith(TOKENIZER_STARTS) or path.suffix in TOKENIZER_SUFFIXES


def _raise(error: OSError) -> None:
    raise error


def links_to(path: Path) -> list[Path]:
    """Return every symbolic link on the way to a path: one turned elsewhere replaces all behind it.

    Links lead to others, by their targets' directories too: ``prod`` to ``stable``, that to ``v1``.

    Raises:
        InvalidError: They are more than any system follows.
        OSError: One cannot be read.
    """
    whole = path.absolute()
    found: list[Path] = []
    at, parts = Path(whole.anchor), list(reversed(whole.parts[1:]))
    while parts:
        part = parts.pop()
        if part == "..":
            at = at.parent  # No link is in it any more, so its parent is the one above.
        elif (entry := at / part).is_symlink():
            if len(found) >= LINKS_MAX:
                raise InvalidError(f"{path} lies behind more than {LINKS_MAX} symbolic links")
            found.append(entry)
            target = entry.readlink()
            if target.is_absolute():
                at = Path(target.anchor)
            parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            at = entry
    return found


def _repository(directory: str) -> str:
    """Return the repository whose snapshots a directory of the hub's cache holds.

    >>> _repository("models--org--name")
    'org/name'
    """
    return directory.removeprefix("models--").replace("--", "/", 1)


def _resolved_commit(source: WeightSource) -> str:
    """Return the commit whose weights a hub's cache served.

    A branch may move between the reading of the config and that of the weights: both must agree.

    Raises:
        InvalidError: No commit is known, or two are.
    """
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return source.revision
    cached = _cached_commit(source)
    if cached is None or (source.config_commit or cached) != cached:
        raise InvalidError(
            f"cannot tell which commit's weights {source.model!r} are (revision {source.revision!r}; "
            f"config of {source.config_commit}, weights of {cached}): serve a local directory, or "
            "--revision with a full commit"
        )
    if source.config_commit is None:
        raise InvalidError(
            f"the config of {source.model!r} names no commit, so its branch may have moved while it "
            "was loaded: serve a local directory, or --revision with a full commit"
        )
    return cached


def _cached_commit(source: WeightSource) -> str | None:
    """Return the commit that the hub's cache has for a revision, without the network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=source.model, repo_type="model")
    reference = Path(source.hub_cache or constants.HF_HUB_CACHE, folder, "refs")
    try:
        commit = (reference / (source.revision or "main")).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None
