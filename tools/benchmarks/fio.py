"""fio doing what the tiers do: whole files of one chunk each, past the page cache, some in flight."""

import json
import shutil
import subprocess
from pathlib import Path

__all__ = ["Fio"]


class Fio:
    """Runs fio on one directory; files are written by one run and read by the next."""

    def __init__(self, directory: Path, *, chunk_bytes: int, depth: int) -> None:
        self._directory = directory
        self._chunk_bytes = chunk_bytes
        self._depth = depth

    @staticmethod
    def is_here() -> bool:
        """Whether fio is installed."""
        return shutil.which("fio") is not None

    def run(self, *, chunks: int, store: bool) -> float:
        """Write or read ``chunks`` files; return the seconds that fio counts for it.

        A thread for each chunk in flight, since writes that make a file longer are not asynchronous on
        any Linux filesystem.
        """
        files_each = chunks // self._depth
        command = [
            "fio",
            "--name=chunks",
            f"--directory={self._directory}",
            f"--rw={'write' if store else 'read'}",
            "--ioengine=psync",
            "--direct=1",
            "--thread",
            f"--numjobs={self._depth}",
            f"--nrfiles={files_each}",
            f"--bs={self._chunk_bytes}",
            f"--filesize={self._chunk_bytes}",
            f"--size={files_each * self._chunk_bytes}",
            "--file_service_type=sequential",
            "--fallocate=none",
            "--invalidate=0",
            "--group_reporting",
            "--output-format=json",
        ]
        if store:
            command.append("--create_on_open=1")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout)["jobs"][0]["write" if store else "read"]
        assert figures["io_bytes"] == chunks * self._chunk_bytes, figures
        return chunks * self._chunk_bytes / float(figures["bw_bytes"])
