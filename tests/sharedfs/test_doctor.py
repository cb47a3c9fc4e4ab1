"""The doctor on mounts: it says what is so, ends on one that hangs, and leaves nothing behind."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.sharedfs.gluster import Volume
from tests.sharedfs.hosts import Hosts


def doctor(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``prefixstore doctor`` in a process of its own."""
    command = [sys.executable, "-m", "prefixstore.cli", "doctor", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_shared_filesystem_is_fit(hosts: Hosts) -> None:
    """With what a store needs, for one host as for two."""
    for root in (hosts.a, hosts.b):
        root.mkdir(exist_ok=True)
        done = doctor(root, "--size", "8MiB", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert {finding["grade"] for finding in found["findings"]} <= {"ok", "note"}
        if hosts.volume is not None:
            assert (found["filesystem"], found["local"]) == ("fuse", False)
    assert hosts.files("*") + hosts.files(".*") == []


def test_a_mount_that_hangs_is_told_and_not_waited_for(own_volume: Volume) -> None:
    """Which step hangs, and an exit code, within the time given."""
    mount = own_volume.mount("a")
    with mount.hanging(limit_s=30):
        start_s = time.monotonic()
        done = doctor(mount.path, "--hang-after", "2")
        took_s = time.monotonic() - start_s
    assert done.returncode == 1
    assert "hangs: 'look at the directory'" in done.stderr
    assert took_s < 10
