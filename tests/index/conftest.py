"""Child processes for the tests of the index."""

import os
import sys
import traceback

import pytest


class Children:
    """Forked children that run one function and never return into pytest."""

    def __init__(self, reports):
        self.reports = reports
        self.alive = {}

    def start(self, work):
        """Fork; the child runs ``work()`` and exits 0, or leaves a report and exits 1."""
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent must read of it
                report = self.reports / f"{os.getpid()}.txt"
                report.write_text(traceback.format_exc())
            finally:
                sys.stdout.flush()
                os._exit(1)
        self.alive[pid] = work
        return pid

    def wait(self, pid):
        """Return the child's exit status: negative for a signal."""
        _, status = os.waitpid(pid, 0)
        del self.alive[pid]
        return os.waitstatus_to_exitcode(status)

    def run(self, work):
        """Start, wait and return the exit status."""
        return self.wait(self.start(work))

    def failures(self):
        """Return the reports of children that raised."""
        return [path.read_text() for path in sorted(self.reports.glob("*.txt"))]

    def kill_all(self):
        for pid in list(self.alive):
            os.kill(pid, 9)
            self.wait(pid)


@pytest.fixture
def children(tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()
    children = Children(reports)
    yield children
    children.kill_all()
