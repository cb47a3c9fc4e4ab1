"""A scrub that goes on: all blobs of a root, slowly, one host at a time, again after an interval.

    scrub/<epoch>.json, .done   whose turn it is: a lease like the collector's (``prefixstore.tree.lease``)
    scrub/cursor.json           the last directory that was checked, and the sums of the pass so far

Whoever has the lease goes on where the cursor is, so that a pass outlives those who make it, and hosts that
all scrub share one pass and do no work twice. Damaged blobs are moved out of the way; a pass of one host
moves a bounded number, since a host that finds many may be the sick one.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from prefixstore.clock import Clock
from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.ops.verify import Finding, Pace, Scrub
from prefixstore.store import PrefixStore
from prefixstore.tree.documents import read_document, replace_document
from prefixstore.tree.lease import Lease
from prefixstore.tree.trouble import translate

__all__ = ["ScrubPass", "scrub", "watch_scrub"]

QUARANTINES_MAX = 16
"""As a store has it: more than a few damaged blobs say more of this host than of the root."""
SAVE_S = 10.0
"""How much work a killed scrub loses, against one small file each time."""
ASK_S = 20.0
"""How often to ask whether the host whose turn it is has ended or died: two beats."""
STEP_S = 1.0
"""The longest wait before another look at whether to stop, and at the lease."""


class CursorDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``scrub/cursor.json``: the last directory checked, and the sums up to it."""

    done: bool = False
    namespace: str = ""
    outer: str = ""
    inner: str = ""
    checked_chunks: int = 0
    checked_bytes: int = 0
    reasons: dict[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubPass:
    """How one turn at a pass ended.

    Attributes:
        state: ``done``; ``stopped`` before its end; ``left`` to another host, whose turn it is;
            ``waiting`` for the next pass to be due; or ``failed``.
        checked_chunks: Blobs checked in this pass, by all hosts.
        checked_bytes: Their files' bytes.
        reasons: What was found in this pass, by all hosts.
        findings: What this turn found, the first ones.
        errors: Sentences on what could not be read or moved.
        wait_s: For how long there is nothing to do.
    """

    state: str
    checked_chunks: int = 0
    checked_bytes: int = 0
    reasons: dict[str, int]
    findings: tuple[Finding, ...] = ()
    errors: tuple[str, ...] = ()
    wait_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found, and everything could be read."""
        return not self.reasons and not self.errors


def watch_scrub(
    store: PrefixStore,
    *,
    interval_s: float,
    rate_bytes_s: float | None,
    stop: threading.Event,
    clock: Clock,
) -> Iterator[ScrubPass]:
    """Scrub until told to stop; yield each turn's end, and each change of what is waited for.

    Args:
        store: The root, not read-only.
        interval_s: From the end of a pass to the start of the next, whoever makes them.
        rate_bytes_s: Read no faster than this; None for as fast as it goes.
        stop: Ends a turn after its blob.
        clock: Measures waits.

    Raises:
        InvalidError: The store is read-only.
    """
    lease = _lease(store, clock)
    last = ""
    while not stop.is_set():
        found = _turn(
            store, lease, interval_s=interval_s, rate_bytes_s=rate_bytes_s, stop=stop, clock=clock
        )
        if found.state not in ("left", "waiting") or found.state != last:
            yield found
        last = found.state
        stop.wait(min(found.wait_s, ASK_S) if found.state == "waiting" else ASK_S)


def scrub(
    store: PrefixStore, *, rate_bytes_s: float | None, stop: threading.Event, clock: Clock
) -> ScrubPass:
    """Begin a pass, or go on with one that was not ended, and make it to its end.

    Raises:
        InvalidError: The store is read-only.
    """
    lease = _lease(store, clock)
    return _turn(store, lease, interval_s=0, rate_bytes_s=rate_bytes_s, stop=stop, clock=clock)


def _lease(store: PrefixStore, clock: Clock) -> Lease:
    if store.read_only:
        raise InvalidError(f"{store.root.path} was opened read-only: it cannot be scrubbed")
    directory = store.root.layout.scrub
    return Lease(store.root, holder=store.tree.writer, clock=clock, directory=directory)


def _turn(
    store: PrefixStore,
    lease: Lease,
    *,
    interval_s: float,
    rate_bytes_s: float | None,
    stop: threading.Event,
    clock: Clock,
) -> ScrubPass:
    """Take the lease if it is free, and go on with the pass that is under way or due."""
    try:
        if not lease.acquire():
            return ScrubPass(state="left", reasons={})
        cursor = _read(store)
        if cursor.done:
            path = _path(store)
            try:
                ended_s = store.root.os_calls.stat(path).modified_s
            except OSError as error:
                raise translate(error, doing="look at", path=path) from error
            wait_s = ended_s + interval_s - lease.server_now_s()
            if wait_s > 0:
                return ScrubPass(state="waiting", reasons={}, wait_s=wait_s)
            cursor = CursorDocument()
        return _Turn(store, lease, cursor, rate_bytes_s=rate_bytes_s, stop=stop, clock=clock).run()
    except PrefixStoreError as error:
        text = getattr(error, "strerror", None) or str(error)
        return ScrubPass(state="failed", reasons={}, errors=(text,))
    finally:
        lease.release()


class _Turn:
    """One host's part of a pass; used once, by one thread."""

    def __init__(
        self,
        store: PrefixStore,
        lease: Lease,
        cursor: CursorDocument,
        *,
        rate_bytes_s: float | None,
        stop: threading.Event,
        clock: Clock,
    ) -> None:
        self._store = store
        self._lease = lease
        self._cursor = cursor
        self._began = cursor
        self._stop = stop
        self._clock = clock
        self._save_at_s = clock.monotonic_s() + SAVE_S
        self._scrub = Scrub(
            store,
            sample=1.0,
            seed=0,
            quarantine=True,
            pace=Pace(rate_bytes_s, clock=clock, sleep=self._wait),
            quarantines_max=QUARANTINES_MAX,
        )

    def run(self) -> ScrubPass:
        """Check what is left of the pass, or as much as there is time for."""
        for namespace in list(self._store.root.namespaces()):
            if namespace >= self._began.namespace and not self._run_namespace(namespace):
                self._save()
                return self._report("stopped")
        self._cursor = msgspec.structs.replace(self._cursor, done=True)
        self._save()
        return self._report("done")

    def _run_namespace(self, namespace: NamespaceId) -> bool:
        began = self._began
        after = (began.outer, began.inner) if namespace == began.namespace else ("", "")
        if after == ("", ""):
            self._scrub.check_manifest(namespace)
        try:
            for (outer, inner), entries in self._store.tree.scan(namespace, after=after):
                for entry in entries:
                    if not self._goes_on():
                        return False
                    self._scrub.check(entry)
                self._cursor = self._at(namespace, outer, inner)
                if self._clock.monotonic_s() >= self._save_at_s:
                    self._save()
        except PrefixStoreError as error:
            # What cannot be listed now is passed over, as verify does, and told.
            self._scrub.errors.append(str(error))
        return self._goes_on()

    def _goes_on(self) -> bool:
        return not self._stop.is_set() and self._lease.renew()

    def _wait(self, duration_s: float) -> None:
        """Wait in steps, so that the lease beats and a stop is heard."""
        end_s = self._clock.monotonic_s() + duration_s
        while (left_s := end_s - self._clock.monotonic_s()) > 0 and self._goes_on():
            self._stop.wait(min(left_s, STEP_S))

    def _at(self, namespace: NamespaceId, outer: str, inner: str) -> CursorDocument:
        now, began = self._scrub.report(seed=0), self._began
        return CursorDocument(
            namespace=namespace,
            outer=outer,
            inner=inner,
            checked_chunks=began.checked_chunks + now.checked_chunks,
            checked_bytes=began.checked_bytes + now.checked_bytes,
            reasons=dict(Counter(began.reasons) + Counter(now.reasons)),
        )

    def _save(self) -> None:
        """Put the cursor where the next turn finds it, unless this turn has passed to another host."""
        self._save_at_s = self._clock.monotonic_s() + SAVE_S
        if self._lease.epoch:
            root = self._store.root
            replace_document(
                _path(self._store),
                self._cursor,
                os_calls=root.os_calls,
                mode=root.document_mode,
            )

    def _report(self, state: str) -> ScrubPass:
        now, began = self._scrub.report(seed=0), self._began
        return ScrubPass(
            state=state,
            checked_chunks=began.checked_chunks + now.checked_chunks,
            checked_bytes=began.checked_bytes + now.checked_bytes,
            reasons=dict(Counter(began.reasons) + Counter(now.reasons)),
            findings=now.findings,
            errors=now.errors,
        )


def _path(store: PrefixStore) -> str:
    return f"{store.root.layout.scrub}/cursor.json"


def _read(store: PrefixStore) -> CursorDocument:
    """Return where a pass is; one that cannot be understood begins anew."""
    try:
        found = read_document(_path(store), CursorDocument, os_calls=store.root.os_calls)
    except InvalidError:
        found = None
    return found or CursorDocument()
