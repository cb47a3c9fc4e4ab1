"""Who the weights are: a resolved commit, or a digest of the very files.

A name proves nothing: the files behind it are replaced, a branch moves on. A local directory is
identified by the XXH3-128 of each file that can hold weights; digests are remembered by the file's
inode, size and times, so that an unchanged model costs a few stats.
"""

import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import xxhash

from prefixstore.errors import InvalidError

__all__ = ["WeightDigests", "identify_weights"]

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
FILES_MAX = 10_000
READ_BYTES = 8 * 2**20
COMMIT = re.compile(r"[0-9a-f]{40}")


class WeightDigests:
    """Digests of large files, remembered in one small JSON file. Not thread-safe.

    The memory is a hint keyed by what the kernel says of a file; a file rewritten in place with its
    size, inode and both times unchanged is beyond it.
    """

    def __init__(self, remembered: Path | None) -> None:
        self._path = remembered
        self._known: dict[str, str] = {}
        if remembered is not None and remembered.exists():
            try:
                self._known = msgspec.json.decode(remembered.read_bytes(), type=dict[str, str])
            except (msgspec.DecodeError, OSError):
                self._known = {}

    def digest(self, path: Path) -> str:
        """Return the hex XXH3-128 of a file's content.

        Raises:
            OSError: The file cannot be read.
        """
        stat = path.stat()
        identity = (
            f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        )
        if (known := self._known.get(identity)) is not None:
            return known
        hasher = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                hasher.update(piece)
        self._known[identity] = hasher.hexdigest()
        self._remember()
        return hasher.hexdigest()

    def _remember(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_bytes(msgspec.json.encode(self._known))
            temporary.replace(self._path)
        except OSError:
            return  # The digest is right all the same; the next start reads the weights again.


def identify_weights(
    model: str, revision: str | None, *, digests: WeightDigests
) -> Mapping[str, object]:
    """Return what names the weights beyond doubt.

    Args:
        model: A local directory or file, or the name of a model on a hub.
        revision: The revision asked for, if any.
        digests: Digests of local files.

    Raises:
        InvalidError: The weights are neither local nor of a known commit.
    """
    path = Path(model)
    if not path.exists():
        commit = _cached_commit(model, revision)
        if commit is None:
            raise InvalidError(
                f"cannot tell which weights {model!r} are (revision {revision!r}): no snapshot of "
                "it in the hub's cache. Serve a local directory, or a revision that is a commit"
            )
        return {"repository": model, "commit": commit}
    resolved = path.resolve()
    if COMMIT.fullmatch(resolved.name) and resolved.parent.name == "snapshots":
        return {"repository": resolved.parent.parent.name, "commit": resolved.name}
    files = [resolved] if resolved.is_file() else sorted(_weight_files(resolved))
    if not files:
        raise InvalidError(f"{resolved} holds no weights ({', '.join(sorted(WEIGHT_SUFFIXES))})")
    try:
        return {"files": {file.name: digests.digest(file) for file in files}}
    except OSError as error:
        raise InvalidError(f"cannot read the weights to identify them: {error}") from error


def _weight_files(directory: Path) -> Iterator[Path]:
    """Yield the files that vLLM's loaders may read, bounded."""
    for count, path in enumerate(directory.iterdir()):
        if count >= FILES_MAX:
            raise InvalidError(f"{directory} holds over {FILES_MAX} files: not a model's directory")
        if path.suffix in WEIGHT_SUFFIXES and path.is_file():
            yield path


def _cached_commit(model: str, revision: str | None) -> str | None:
    """Return the commit of the snapshot that the hub's cache would serve, without the network."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    commit = Path(found).parent.name
    return commit if COMMIT.fullmatch(commit) else None
