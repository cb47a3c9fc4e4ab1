"""Scrub: read blobs as a load would and name every one that would be a miss.

Costs what reading costs: a root of a terabyte at 500 MB/s takes half an hour, so a share of the blobs, by
lot, and a limit of the rate are offered. Nothing is changed unless damaged blobs are to be quarantined.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xxhash

from prefixstore.blob.reasons import MissReason
from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.keys import NamespaceId, namespace_id
from prefixstore.store import PrefixStore
from prefixstore.tree.blobs import BlobTree, Miss, ScanEntry
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.quarantine import Quarantine

__all__ = ["Finding", "Pace", "Scrub", "VerifyReport", "verify"]

FINDINGS_MAX = 1000
"""Findings that are told one by one; all are counted."""
LOTS = 2**64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        path: The file.
        reason: The check that failed; see ``MissReason``. ``manifest`` for a namespace's manifest.
        detail: What was found and what was expected.
        quarantined: It was moved out of the way.
    """

    path: str
    reason: str
    detail: str
    quarantined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a scrub has met.

    Attributes:
        checked_chunks: Blobs that were read.
        checked_bytes: Their files' bytes.
        skipped_chunks: Blobs that the lot passed over.
        findings: The first findings, one by one.
        reasons: All findings, by reason.
        errors: Sentences on what could not be read at all, so was not checked.
        seed: Draws the same lot again.
    """

    checked_chunks: int
    checked_bytes: int
    skipped_chunks: int
    findings: tuple[Finding, ...]
    reasons: dict[str, int]
    errors: tuple[str, ...]
    seed: int

    @property
    def is_clean(self) -> bool:
        """Whether everything that was to be checked was, and passed."""
        return not self.reasons and not self.errors


def verify(
    store: PrefixStore,
    *,
    namespace: NamespaceId | None = None,
    sample: float = 1.0,
    seed: int = 0,
    quarantine: bool = False,
    rate_bytes_s: float | None = None,
    progress: Progress = lambda _chunks, _bytes: None,
    clock: Clock | None = None,
) -> VerifyReport:
    """Check the blobs of a root.

    Args:
        store: The root, opened; not read-only if ``quarantine`` is set.
        namespace: Only this one; None for all.
        sample: The share of blobs to check, drawn by lot.
        seed: Which lot: another seed checks other blobs.
        quarantine: Move what is damaged out of the way, so that it is stored anew.
        rate_bytes_s: Read no faster than this.
        progress: Called after each blob with the sums so far.
        clock: For the rate; the machine's if None.

    Raises:
        InvalidError: The share is no share, or the store is read-only and should quarantine.
    """
    if not 0 < sample <= 1:
        raise InvalidError(f"a sample is a share above 0 and up to 1, not {sample}")
    if quarantine and store.read_only:
        raise InvalidError(f"{store.root.path} was opened read-only: it quarantines nothing")
    clock = clock or SystemClock()
    scrub = Scrub(
        store,
        sample=sample,
        seed=seed,
        quarantine=quarantine,
        pace=Pace(rate_bytes_s, clock=clock, sleep=clock.sleep),
        progress=progress,
    )
    try:
        namespaces = [namespace] if namespace is not None else list(store.root.namespaces())
    except PrefixStoreError as error:
        scrub.errors.append(str(error))
        namespaces = []
    for each in namespaces:
        scrub.check_manifest(each)
        scrub.check_blobs(each)
    return scrub.report(seed)


class Pace:
    """Waits so that reading stays below a rate; used by one thread."""

    def __init__(
        self, rate_bytes_s: float | None, *, clock: Clock, sleep: Callable[[float], object]
    ) -> None:
        """Begin to read, with a way to wait for so many seconds, or less if that is not to go on."""
        self._rate_bytes_s = rate_bytes_s
        self._sleep = sleep
        self._clock = clock
        self._start_s = clock.monotonic_s()

    def wait(self, total_bytes: int) -> None:
        """Wait until ``total_bytes`` may have been read."""
        if self._rate_bytes_s:
            due_s = self._start_s + total_bytes / self._rate_bytes_s
            left_s = due_s - self._clock.monotonic_s()
            if left_s > 0:
                self._sleep(left_s)


class Scrub:
    """The running sums of one scrub; used by one thread."""

    def __init__(
        self,
        store: PrefixStore,
        *,
        sample: float,
        seed: int,
        quarantine: bool,
        pace: Pace,
        progress: Progress = lambda _chunks, _bytes: None,
        quarantines_max: int | None = None,
    ) -> None:
        """Begin a scrub; arguments as ``verify`` has them.

        Args:
            store: The root.
            sample: The share of blobs to check.
            seed: Which lot.
            quarantine: Move what is damaged.
            pace: Waits between blobs.
            progress: Told of the sums.
            quarantines_max: Move no more than so many: a host that finds more may be the sick one.
        """
        self._quarantines_left = quarantines_max
        self._root = store.root
        self._tree: BlobTree = store.tree
        self._sample = sample
        self._seed = seed
        self._pace = pace
        self._progress = progress
        self._quarantine: Quarantine | None = None
        if quarantine:
            self._quarantine = Quarantine(store.root, bytes_max=store.config.quarantine_bytes_max)
        self._buffer = Buffer.allocate(2**20)
        self._checked_chunks = 0
        self._checked_bytes = 0
        self._skipped_chunks = 0
        self._findings: list[Finding] = []
        self._reasons: Counter[str] = Counter()
        self.errors: list[str] = []

    def check_manifest(self, namespace: NamespaceId) -> None:
        """Check that a namespace's manifest is there and names it."""
        path = self._root.layout.manifest(namespace)
        try:
            manifest = self._root.manifest(namespace)
        except InvalidError as error:
            self._found(Finding(path=path, reason="manifest", detail=str(error)))
            return
        except PrefixStoreError as error:
            self.errors.append(str(error))
            return
        if manifest is None:
            detail = "it is missing; opening the namespace writes it again"
        elif namespace_id(manifest.fields) != namespace:
            detail = f"its fields belong to namespace {namespace_id(manifest.fields)}"
        else:
            return
        self._found(Finding(path=path, reason="manifest", detail=detail))

    def check_blobs(self, namespace: NamespaceId) -> None:
        """Check every blob of a namespace that the lot falls on."""
        try:
            for entry in self._entries(namespace):
                if self._is_drawn(entry):
                    self.check(entry)
                else:
                    self._skipped_chunks += 1
        except PrefixStoreError as error:
            self.errors.append(str(error))

    def report(self, seed: int) -> VerifyReport:
        """Freeze the sums."""
        return VerifyReport(
            checked_chunks=self._checked_chunks,
            checked_bytes=self._checked_bytes,
            skipped_chunks=self._skipped_chunks,
            findings=tuple(self._findings),
            reasons=dict(self._reasons),
            errors=tuple(self.errors),
            seed=seed,
        )

    def _entries(self, namespace: NamespaceId) -> Iterator[ScanEntry]:
        for _, entries in self._tree.scan(namespace):
            yield from entries

    def _is_drawn(self, entry: ScanEntry) -> bool:
        # By the key and the seed, so that the same seed finds the same blobs again.
        lot = xxhash.xxh3_64_intdigest(entry.key, seed=self._seed)
        return lot < self._sample * LOTS

    def check(self, entry: ScanEntry) -> None:
        """Check one blob."""
        miss = self._read(entry)
        if miss is not None and miss.reason is not MissReason.IO:
            # A client's cache may be at fault: only what fails twice is a finding.
            miss = self._read(entry)
        self._checked_chunks += 1
        self._checked_bytes += entry.file_bytes
        self._progress(self._checked_chunks, self._checked_bytes)
        self._pace.wait(self._checked_bytes)
        if miss is None or miss.reason is MissReason.ABSENT:
            return  # Evicted since its directory was listed.
        if miss.reason is MissReason.IO:
            self.errors.append(miss.detail)
            return
        path = self._root.layout.blob(entry.namespace, entry.key)
        quarantined = self._condemn(entry, miss)
        if quarantined is False:
            return  # It has gone, or somebody has put a sound one in its place.
        self._found(
            Finding(
                path=path, reason=miss.reason, detail=miss.detail, quarantined=bool(quarantined)
            )
        )

    def _read(self, entry: ScanEntry) -> Miss | None:
        header = self._tree.read_header(entry.namespace, entry.key)
        if isinstance(header, Miss):
            return header
        if self._buffer.capacity_bytes < header.raw_bytes:
            self._buffer = Buffer.allocate(header.raw_bytes)
        loaded = self._tree.load(
            entry.namespace, entry.key, self._buffer, raw_bytes=header.raw_bytes
        )
        return loaded if isinstance(loaded, Miss) else None

    def _condemn(self, entry: ScanEntry, miss: Miss) -> bool | None:
        """Move a blob out of the way; False if it turns out not to be damaged, None if it is left."""
        # A version that this reader does not know is no damage.
        if self._quarantine is None or miss.reason is MissReason.VERSION:
            return None
        if self._quarantines_left is not None:
            if not self._quarantines_left:
                return None
            self._quarantines_left -= 1
        try:
            return self._quarantine.take(entry.namespace, entry.key, miss.reason)
        except PrefixStoreError as error:
            self.errors.append(str(error))
            return None

    def _found(self, finding: Finding) -> None:
        self._reasons[finding.reason] += 1
        if len(self._findings) < FINDINGS_MAX:
            self._findings.append(finding)
