"""What a process is told of its machine, in a container and out of it."""

from pathlib import Path

import pytest

from prefixstore.vllm.machine import memory_limits, name_shared_memory

V1 = "13:cpu,cpuacct:/a\n9:memory:/docker/b\n0::/docker/b\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "limits"),
    [
        ("0::/\n", {"memory.max": "8589934592\n"}, [8589934592]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/\n", {}, []),
        (
            "0::/pod/engine\n",
            {"pod/memory.max": "4096\n", "pod/engine/memory.max": "max\n"},
            [4096],
        ),
        (V1, {"memory/docker/b/memory.limit_in_bytes": "4096\n"}, [4096]),
        (V1, {"memory/memory.limit_in_bytes": "4096\n"}, [4096]),
        (None, {"memory.max": "4096\n"}, []),
    ],
)
def test_the_limits_of_all_cgroups_around_a_process_count(
    tmp_path: Path, cgroup: str | None, files: dict[str, str], limits: list[int]
) -> None:
    """By either version, of its own and of those above it; no file and "max" are no limit."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    if cgroup is not None:
        (proc / "self/cgroup").write_text(cgroup)
    for name, content in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(content)

    assert limits == memory_limits(proc=proc, cgroups=cgroups)


def test_a_process_names_its_shared_memory_the_same_each_time() -> None:
    """Workers and scheduler compare what each says for itself."""
    assert name_shared_memory() == name_shared_memory()
