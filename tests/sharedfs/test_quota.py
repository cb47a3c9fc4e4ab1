"""One quota for a whole root: writer processes on two mounts, at full speed."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefixstore.store.space import HIGH_SHARE
from tests.sharedfs.filler import FILLER_FILE_BYTES
from tests.sharedfs.hosts import Hosts, until

REPO = Path(__file__).resolve().parents[2]
MAX_BYTES = 40 * 2**20
CHUNKS = 60
"""Each writer's: together one and a half quotas."""
FILL_S = 60.0
"""Enough for a busy machine; seconds on an idle one."""
SETTLE_S = 20.0


def used_bytes(root: Path) -> int:
    """Add up the blobs on the server's own disk, published or not."""
    used = 0
    for path in root.glob("ns/*/*/*/*"):
        with contextlib.suppress(FileNotFoundError):
            used += path.stat().st_size
    return used


@contextlib.contextmanager
def fillers(
    hosts: Hosts, indexes: Path, *, max_bytes: int
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Run four writers, two on each mount, of which two share an index; end them at the end."""
    with ExitStack() as running:
        writers = []
        for number in range(4):
            root = (hosts.a, hosts.b)[number % 2]
            # The writers of one host share an index, as engines do.
            index = indexes / f"host-{number % 2}"
            arguments = [
                str(root),
                str(index),
                str(number),
                str(FILL_S),
                str(max_bytes),
                str(CHUNKS),
            ]
            writer = subprocess.Popen(
                [sys.executable, "-m", "tests.sharedfs.filler", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPO,
                env={**os.environ},
            )
            running.callback(writer.wait, 30)
            running.callback(writer.communicate)
            writers.append(writer)
        yield writers


@pytest.mark.parametrize("hosts", ["glusterfs"], indirect=True)
def test_four_writers_keep_one_quota(hosts: Hosts, tmp_path: Path) -> None:
    """At no moment more than the quota and what is in flight; afterwards below the high watermark."""
    hosts.store_on(hosts.a)
    most = 0
    with fillers(hosts, tmp_path, max_bytes=MAX_BYTES) as writers:
        end_s = time.monotonic() + FILL_S + 10
        said: list[str] = []
        while len(said) < len(writers):
            assert time.monotonic() < end_s, "the writers do not end"
            most = max(most, used_bytes(hosts.disk))
            time.sleep(0.02)
            said = _lines(writers, said)
        settled_s = until(
            lambda: used_bytes(hosts.disk) <= HIGH_SHARE * MAX_BYTES, within_s=SETTLE_S
        )
    done = [json.loads(line) for line in said]
    stored = sum(each["outcomes"].get("stored", 0) for each in done) * FILLER_FILE_BYTES
    sys.stdout.write(
        f"at most {most / MAX_BYTES:.1%}, {stored / MAX_BYTES:.1f} quotas stored, "
        f"settled after {settled_s:.1f} s, {done}\n"
    )
    assert most <= MAX_BYTES + 4 * FILLER_FILE_BYTES
    assert stored == 4 * CHUNKS * FILLER_FILE_BYTES


def _lines(writers: list["subprocess.Popen[str]"], said: list[str]) -> list[str]:
    """Return the lines of the writers that have spoken, without waiting for the others."""
    for writer in writers[len(said) :]:
        assert writer.stdout is not None
        os.set_blocking(writer.stdout.fileno(), False)
        line = writer.stdout.readline()
        if not line:
            break
        said = [*said, line]
    return said
