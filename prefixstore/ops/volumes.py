"""An archive's files: one, or several of a bounded size that together are the stream.

    kv.pfx                  whole
    kv.pfx.001, .002, ...   split; ``cat kv.pfx.*`` gives the same bytes

Written under temporary names, and named when all is written and on the disk: what has the name of an archive is
whole.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from prefixstore.errors import FullError, InvalidError, UnavailableError
from prefixstore.tree.trouble import translate

__all__ = ["VolumeReader", "VolumeWriter", "open_volumes", "volumes_of"]

FIRST = ".001"
VOLUMES_MAX = 999


class VolumeWriter(io.RawIOBase):
    """A stream into files. A context manager: names them at the end, removes them after an error."""

    def __init__(self, path: Path, *, split_bytes: int | None) -> None:
        """Take the archive's path, and the size that no file exceeds; None for one file."""
        super().__init__()
        self._path = path
        self._split_bytes = split_bytes
        self._written: list[tuple[Path, Path]] = []
        self._file: BinaryIO | None = None
        self._room_bytes = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: "memoryview | bytes", /) -> int:  # type: ignore[override]  # narrower, as we call it
        """Write all of ``data``.

        Raises:
            FullError, UnavailableError: A file cannot be written.
        """
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while rest:
                if self._file is None or not self._room_bytes:
                    self._next()
                assert self._file is not None
                piece = rest[: self._room_bytes]
                self._file.write(piece)
                self._room_bytes -= len(piece)
                rest = rest[len(piece) :]
        except OSError as error:
            raise self._translated(error) from error
        return length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
            for temporary, path in self._written:
                temporary.replace(path)
        except OSError as failure:
            self._abandon()
            raise self._translated(failure) from failure

    def _next(self) -> None:
        self._finish()
        number = len(self._written) + 1
        if number > VOLUMES_MAX:
            raise InvalidError(
                f"{self._path} would have more than {VOLUMES_MAX} parts: split into larger ones"
            )
        path = self._path
        if self._split_bytes is not None:
            path = path.with_name(f"{path.name}.{number:03d}")
        temporary = path.with_name(f".{path.name}.tmp")
        self._file = temporary.open("wb")
        self._written.append((temporary, path))
        self._room_bytes = self._split_bytes or 2**62

    def _finish(self) -> None:
        """Put the current file on the disk and close it."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        for temporary, _ in self._written:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _translated(self, error: OSError) -> FullError | UnavailableError:
        if isinstance(error, FullError | UnavailableError):
            return error
        translated = translate(error, doing="write", path=str(self._path))
        assert isinstance(translated, FullError | UnavailableError)
        return translated


class VolumeReader(io.RawIOBase):
    """The stream of an archive's files, one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self._paths = iter(paths)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, room: memoryview, /) -> int:  # type: ignore[override]  # narrower, as io calls it
        """Fill ``room`` as far as one file goes; 0 at the end of the last."""
        while True:
            if self._file is None:
                path = next(self._paths, None)
                if path is None:
                    return 0
                self._file = path.open("rb")
            count = self._file.readinto(room)  # type: ignore[attr-defined]  # a file of bytes
            if count:
                return int(count)
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file that is being read."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def volumes_of(path: Path) -> list[Path]:
    """Return the files of an archive, named by its own path or by its first part.

    Raises:
        InvalidError: There is none.
    """
    base = path.with_name(path.name.removesuffix(FIRST)) if path.name.endswith(FIRST) else path
    if base == path and path.is_file():
        return [path]
    parts = list(_parts(base))
    if not parts:
        raise InvalidError(f"{path} is not there, nor is {base}{FIRST}: name an archive")
    return parts


@contextlib.contextmanager
def open_volumes(paths: list[Path]) -> Iterator[BinaryIO]:
    """Open the stream of an archive's files.

    Raises:
        UnavailableError: One cannot be read.
    """
    try:
        with VolumeReader(paths) as raw, io.BufferedReader(raw, 2**20) as stream:
            yield stream
    except OSError as error:
        if isinstance(error, FullError | UnavailableError):
            raise
        raise UnavailableError(
            f"cannot read {error.filename or paths[0]}: {error.strerror}"
        ) from error


def _parts(base: Path) -> Iterator[Path]:
    for number in range(1, VOLUMES_MAX + 1):
        part = base.with_name(f"{base.name}.{number:03d}")
        if not part.is_file():
            return
        yield part
