"""What a store can expect of a filesystem: try it, measure it, say what that means, recommend settings.

Everything happens in one directory of the doctor's own, ``.prefixstore-doctor-<id>`` below the path, which
is outside the grammar of a root's names and is taken away at the end, whatever happened. So it may be run
on a root that engines use; the bytes it moves are its own.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.index.filesystems import filesystem_of
from prefixstore.ops.checks import CHECKS, Finding, Grade, Scratch, check_space
from prefixstore.ops.timings import Bandwidth, Latency, bandwidths, latencies
from prefixstore.tree.osfs import Os
from prefixstore.tree.trouble import is_missing, translate

__all__ = ["Diagnosis", "diagnose", "recommend"]

SPACE_SHARE_MAX = 0.01
"""Of the free space that a measurement may use."""
SLOW_LINK_BYTES_PER_S = 1.2e9
"""Below this a core that decodes byte planes (0.9 to 1.7 GB/s) brings more than the link does."""
SLOW_LOOK_S = 0.001
SLOW_TOUCH_S = 0.005
FREE_SHARE = 0.05
CLEANING_ATTEMPTS = 3
"""A mount that answers nothing but errors keeps the directory, whose name is then told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        path: Where.
        filesystem: Its kind, as the kernel names it.
        local: One kernel's own; others cannot share it.
        is_root: A store is here already.
        findings: The checks, in order.
        latencies: Small calls.
        bandwidths: Bytes.
        settings: Recommended settings that differ from the defaults, by name.
        reasons: Why, by the same names.
        errors: What could not be tried.
    """

    path: str
    filesystem: str
    local: bool
    is_root: bool
    findings: tuple[Finding, ...]
    latencies: tuple[Latency, ...]
    bandwidths: tuple[Bandwidth, ...]
    settings: dict[str, object]
    reasons: dict[str, str]
    errors: tuple[str, ...]

    @property
    def fit(self) -> bool:
        """Whether a store can be kept here."""
        return not self.errors and all(f.grade is not Grade.PROBLEM for f in self.findings)


def diagnose(
    path: str,
    *,
    os_calls: Os,
    clock: Clock,
    size_bytes: int,
    begin: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Try and measure the filesystem of a directory.

    Args:
        path: A root, or a directory that is to hold one.
        os_calls: The seam.
        clock: The clock.
        size_bytes: How much to write and read at most; 0 measures no bandwidth.
        begin: Told the name of each step before it is taken: a step that hangs is then known.

    Raises:
        InvalidError: There is no such directory.
        UnavailableError: It cannot be reached.
    """
    begin("look at the directory")
    names = _look(path, os_calls)
    kind = filesystem_of(Path(path))
    findings: list[Finding] = []
    timed: list[Latency] = []
    moved: list[Bandwidth] = []
    errors: list[str] = []
    total_bytes = free_bytes = 0
    with _noting(errors, "look at the room"):
        findings.append(check_space(path, os_calls))
        total_bytes, free_bytes, _ = os_calls.space(path)
    try:
        with _scratch(path, os_calls, clock) as scratch:
            for name, check in CHECKS.items():
                begin(name)
                with _noting(errors, name):
                    findings.append(check(scratch))
            begin("time small calls")
            with _noting(errors, "time small calls"):
                timed = latencies(scratch)
            begin("move bytes")
            room = int(free_bytes * SPACE_SHARE_MAX)
            if min(size_bytes, room) > 0:
                is_direct = any(f.check == "direct I/O" and f.grade is Grade.OK for f in findings)
                with _noting(errors, "move bytes"):
                    moved = bandwidths(scratch, size_bytes=min(size_bytes, room), direct=is_direct)
            begin("clean up")
    except PrefixStoreError as error:
        errors.append(str(error.args[-1]))
    settings, reasons = recommend(findings, timed, moved, total_bytes=total_bytes)
    return Diagnosis(
        path=path,
        filesystem=kind.name,
        local=kind.local,
        is_root="store.json" in names,
        findings=tuple(findings),
        latencies=tuple(timed),
        bandwidths=tuple(moved),
        settings=settings,
        reasons=reasons,
        errors=tuple(errors),
    )


def recommend(
    findings: list[Finding], timed: list[Latency], moved: list[Bandwidth], *, total_bytes: int
) -> tuple[dict[str, object], dict[str, str]]:
    """Return settings that suit what was found, and why; only those that differ from the defaults."""
    settings: dict[str, object] = {}
    reasons: dict[str, str] = {}

    def set_(name: str, value: object, reason: str) -> None:
        settings[name] = value
        reasons[name] = reason

    medians: Mapping[str, float] = {latency.operation: latency.median_s for latency in timed}
    slowest = min((b.bytes_per_s for b in moved), default=None)
    if any(f.check == "direct I/O" and f.grade is not Grade.OK for f in findings):
        set_("direct_io", "off", "the filesystem refuses O_DIRECT")
    if slowest is not None and slowest < SLOW_LINK_BYTES_PER_S:
        set_(
            "codec",
            "auto",
            f"at {slowest / 1e6:.0f} MB/s the link is slower than decoding: fewer bytes are faster",
        )
    look_s = medians.get("look for a missing file", 0.0)
    if look_s > SLOW_LOOK_S:
        set_("miss_ttl_s", 5.0, f"looking for a missing chunk takes {look_s * 1e3:.1f} ms")
    touch_s = medians.get("touch", 0.0)
    if touch_s > SLOW_TOUCH_S:
        set_("touch_interval_s", 3600.0, f"a touch takes {touch_s * 1e3:.1f} ms")
    if total_bytes:
        set_(
            "min_free_bytes",
            int(total_bytes * FREE_SHARE) // 2**20 * 2**20,
            "leaves a twentieth of the filesystem free; set max_bytes, too, if others use it",
        )
    return settings, reasons


def _look(path: str, calls: Os) -> set[str]:
    """Return the names in a directory."""
    try:
        return {entry.name for entry in calls.scan(path)}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidError(
            f"{path} is no directory: make it, or name the mount that is to hold the store"
        ) from error
    except OSError as error:
        raise translate(error, doing="list", path=path) from error


@contextmanager
def _scratch(path: str, calls: Os, clock: Clock) -> Iterator[Scratch]:
    """Make a directory for checks, and take it away with all that is in it.

    Raises:
        UnavailableError: It cannot be made, or not be taken away: the error names it.
    """
    directory = f"{path.rstrip('/')}/.prefixstore-doctor-{uuid.uuid4().hex}"
    try:
        calls.make_directory(directory, 0o700)
    except OSError as error:
        raise translate(error, doing="write in", path=path) from error
    try:
        yield Scratch(path=directory, calls=calls, clock=clock)
    finally:
        _take_away(directory, calls)


def _take_away(directory: str, calls: Os) -> None:
    """Remove a directory with its files; a call that fails once is made again.

    Raises:
        UnavailableError: It is still there; the error names it.
    """
    for attempt in range(CLEANING_ATTEMPTS):
        try:
            for entry in calls.scan(directory):
                calls.unlink(f"{directory}/{entry.name}")
            calls.remove_directory(directory)
        except OSError as error:
            if is_missing(error) and attempt:
                return
            if attempt + 1 == CLEANING_ATTEMPTS:
                raise translate(error, doing="take away", path=directory) from error
        else:
            return


@contextmanager
def _noting(errors: list[str], step: str) -> Iterator[None]:
    """Note what the filesystem refuses to do at all, and go on with the next step."""
    try:
        yield
    except OSError as error:
        errors.append(f"{step}: {error.strerror or error}")
