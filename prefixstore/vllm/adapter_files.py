"""Who an adapter (LoRA) is: the content of its files, and whether they are the same as before.

    files = AdapterFiles(Path("/adapters/sql"))      # before a worker loads it
    ...                                               # it is loaded, and KV is computed with it
    digest = files.prove(digests)                     # after: every load in between read this content

A **signature** is what the kernel says of each file, of its directory, and of all links on the way to it:
device, inode, size and times. The change time can be set by nobody, so files whose signature is the same
twice held the same content in between, whoever loaded them meanwhile and how often. Nothing else does: a
digest alone would not tell of files that were replaced and put back.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from prefixstore.errors import InvalidError
from prefixstore.vllm.weights import SETTLED_S, WeightDigests, links_to

__all__ = ["AdapterFiles"]

NAMES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
)
"""What vLLM reads of an adapter (vllm/lora/peft_helper.py and lora_model.py)."""

Signature = tuple[tuple[str, int, int, int, int, int], ...]
"""Of each entry: path, device, inode, size, modification and change time in nanoseconds."""


class AdapterFiles:
    """The files of one adapter since they were first looked at. Not thread-safe.

    Raises:
        InvalidError: There is no such directory, it holds no adapter, or it changed just now.
        OSError: It cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._signature = _sign(directory)
        newest_s = max(entry[-1] for entry in self._signature) / 1e9
        if time.time() - newest_s < SETTLED_S:
            raise InvalidError(
                f"{directory} changed less than {SETTLED_S:g} s before it was loaded, and may have "
                "changed once more within the resolution of its times: load it a little later, under "
                "another path or after a restart"
            )

    def check(self) -> None:
        """Return if nothing has changed since this object was made.

        Raises:
            InvalidError: Something has changed.
            OSError: The files cannot be read.
        """
        found = _sign(self._directory)
        if found != self._signature:
            pairs = zip(self._signature, found, strict=False)
            changed = next((now[0] for before, now in pairs if before != now), self._directory)
            raise InvalidError(
                f"{changed} changed after the engine first used this adapter, so what it computed may "
                "be of either content: restart the engine to use the store for it again"
            )

    def digest(self, digests: WeightDigests) -> dict[str, str]:
        """Return the content, by file: the same from when this object was made to this call's end.

        Raises:
            InvalidError: Something has changed.
            OSError: The files cannot be read.
        """
        self.check()
        paths = (self._directory / name for name in NAMES)
        found = {path.name: digests.digest(path) for path in paths if path.is_file()}
        self.check()
        return found


def _sign(directory: Path) -> Signature:
    """Return the signature of what decides an adapter's content."""
    if not directory.is_dir():
        raise InvalidError(
            f"{directory} is no directory on this machine. An adapter of a hub may move on: download "
            "it, and serve the directory"
        )
    files = list(_read_stats(directory))
    if not any(path.name == NAMES[0] for path, _ in files):
        raise InvalidError(f"{directory} holds no {NAMES[0]}: not an adapter's directory")
    resolved = directory.resolve()
    entries = [
        *((link, link.lstat()) for link in links_to(directory)),
        (resolved, resolved.stat()),
        *((link, link.lstat()) for path, _ in files for link in links_to(path)),
        *((path.resolve().parent, path.resolve().parent.stat()) for path, _ in files),
        *((path, path.lstat()) for path, _ in files),
        *files,
    ]
    return tuple(
        (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in entries
    )


def _read_stats(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files that are there with their status.

    Opened for it: a network filesystem asks its server at an open, and may answer ``stat`` from what it
    remembers.
    """
    for name in NAMES:
        path = directory / name
        try:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # No wait on a pipe.
        except FileNotFoundError:
            continue
        try:
            yield path, os.fstat(opened)
        finally:
            os.close(opened)
