"""What an engine's process can use of its machine, and who shares its memory.

A container has less than its host: its cgroup limits the memory, and /dev/shm is a mount of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from prefixstore.errors import InvalidError
from prefixstore.index.place import default_index_dir
from prefixstore.vllm.options import MachineMemory

__all__ = ["digest_memory", "index_dir", "machine_memory", "memory_limits", "name_shared_memory"]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where vLLM puts the CPU tier
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def index_dir() -> str | None:
    """Return the user's place for indexes; without one, the store works with one in memory."""
    try:
        return str(default_index_dir(os.environ))
    except InvalidError:
        return None


def digest_memory(name: str) -> Path | None:
    """Return the user's file that remembers digests of what is called so; None without a place for it."""
    place = index_dir()
    return None if place is None else Path(place).parent / f"{name}.json"


def machine_memory() -> MachineMemory:
    """Return the memory that a CPU tier may be cut from: the host's, or less where a cgroup limits it."""
    shared = os.statvfs(SHARED_MEMORY)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineMemory(
        total_bytes=min([host_bytes, *memory_limits()]),
        shared_bytes=shared.f_frsize * shared.f_blocks,
    )


def name_shared_memory() -> str:
    """Return what tells the /dev/shm of this process from every other: two that name it alike share it.

    The device number tells two mounts of one kernel apart, and the boot id two kernels; where a sandbox
    hides that, the host's name has to do.
    """
    try:
        kernel = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        kernel = os.uname().nodename
    return f"{kernel}:{SHARED_MEMORY.stat().st_dev}"


def memory_limits(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[int]:
    """Return the limits in bytes that this process's cgroups set, by either version of cgroups."""
    return [limit for path in _limit_files(proc, cgroups) if (limit := _read_limit(path))]


def _limit_files(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Name the files that may hold a limit: a cgroup is bound by those above it, too."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's name for what is mounted as the root here.
        inside = Path(path.lstrip("/"))
        for place in (inside, *inside.parents):
            yield base / place / name


def _read_limit(path: Path) -> int | None:
    """Return a limit in bytes; None where there is none ("max"), or no such file."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
