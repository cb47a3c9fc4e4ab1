"""Remove vLLM's offload regions that killed engines left in /dev/shm.

An engine that dies by SIGKILL leaves its whole CPU tier there, hundreds of megabytes of memory each;
a few dozen killed test engines fill the machine. A region goes only if it belongs to this user and no
process has it mapped or open. Runs on its own: the standard library is all it needs.
"""

import contextlib
import os
import sys
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where vLLM puts them
PATTERN = "vllm_offload_*"


def regions() -> dict[str, Path]:
    """Return this user's regions by name."""
    found = {}
    for path in SHM.glob(PATTERN):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid():
                found[path.name] = path
    return found


def in_use(names: set[str]) -> set[str]:
    """Return those of `names` that some process has mapped or open."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at; one that may not be looked at is another user's.
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text()
            used.update(name for name in names if f"{SHM}/{name}" in maps)
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(descriptor.readlink().name)
    return used & names


def main() -> int:
    """Remove what nobody uses; say so on stderr."""
    # Regions are listed before users are looked for: one made in between is not in the list.
    found = regions()
    for name in sorted(set(found) - in_use(set(found))):
        with contextlib.suppress(FileNotFoundError):
            size_mb = found[name].stat().st_size / 1e6
            found[name].unlink()
            print(f"removed leaked {found[name]} ({size_mb:.0f} MB)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
