"""The I/O process: opens the store, then answers requests until its engine is gone.

Started by ``prefixstore.ioproc.process`` as ``python -m prefixstore.ioproc.server`` with the inherited
file descriptors of the stream, the lanes for loads and for stores, and the arena. It owns every file, lock and LMDB page of the store, so that a hung
mount, a damaged index or the GIL of busy I/O threads can hurt this process and never the engine.

Threads: the main thread reads the stream; pools answer (``prefixstore.ioproc.pools``), those for loads
and stores straight from their lanes. A thread that hangs in the kernel is not replaced: the engine's
side notices the deadline, kills this process and starts another.

When the stream ends without ``Stop`` the engine was killed: stores that were queued lie complete in
the arena, so they are still published, for a bounded time, before this process leaves.
"""

import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from prefixstore.clock import Clock, SystemClock
from prefixstore.config import StoreConfig
from prefixstore.errors import FullError, PrefixStoreError, UnavailableError
from prefixstore.ioproc.arena import Arena
from prefixstore.ioproc.messages import (
    Configure,
    Counters,
    Find,
    Found,
    FrameReader,
    Gone,
    Load,
    Loaded,
    Opened,
    Reply,
    Request,
    State,
    Stop,
    Store,
    Stored,
    Touch,
    encode_frame,
    request_decoder,
)
from prefixstore.ioproc.pools import LanePool, Pool, QueuePool
from prefixstore.keys import Fields, Key
from prefixstore.store import Chunk, Miss, PrefixStore

__all__ = ["main"]

logger = logging.getLogger("prefixstore")

RECEIVE_BYTES = 2**16
REOPEN_FIRST_S = 1.0
REOPEN_LONGEST_S = 30.0
"""An unreachable root is tried again at most this often: a mount that heals serves hits again
within half a minute, and one that stays dead costs two attempts a minute."""
FINISH_S = 20.0
"""How long queued stores may take once the engine has left: seconds of dirty buffers, no more."""
COUNTERS_INTERVAL_S = 1.0
READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""A root that may not be written still has hits to give."""


class Server:
    """One store, served to one engine. ``run`` returns when the engine has gone."""

    def __init__(
        self,
        stream: socket.socket,
        arena_fd: int,
        *,
        loads: socket.socket,
        stores: socket.socket,
        clock: Clock,
    ) -> None:
        self._stream = stream
        self._loads = loads
        self._stores = stores
        self._arena_fd = arena_fd
        self._clock = clock
        self._send_lock = threading.Lock()
        self._leaving = threading.Event()
        self._store: PrefixStore | None = None
        self._arena: Arena | None = None
        self._lookups = QueuePool(name="lookup", threads=1, answer=self._answer, send=self._send)
        self._pools: list[Pool] = []

    def run(self) -> None:
        """Serve until ``Stop`` or the end of the stream."""
        reader = FrameReader(request_decoder())
        try:
            while data := self._stream.recv(RECEIVE_BYTES):
                for request in reader.feed(data):
                    if isinstance(request, Stop):
                        return
                    self._accept(request)
        except OSError:
            return  # The engine was killed with requests unread.
        finally:
            self._finish()

    def _accept(self, request: Request) -> None:
        if isinstance(request, Configure):
            self._configure(request)
        else:
            self._lookups.put(request)

    def _configure(self, request: Configure) -> None:
        self._arena = Arena.attach(
            self._arena_fd, count=request.buffer_count, payload_bytes=request.buffer_bytes
        )
        load_threads, store_threads = request.load_threads, request.store_threads
        self._pools = [
            self._lookups,
            LanePool(self._loads, name="load", threads=load_threads, answer=self._answer),
            LanePool(self._stores, name="store", threads=store_threads, answer=self._answer),
        ]
        for pool in self._pools:
            pool.start()
        threading.Thread(target=self._open, args=(request,), name="open", daemon=True).start()
        threading.Thread(target=self._report_counters, name="counters", daemon=True).start()

    def _open(self, request: Configure) -> None:
        """Open the store, trying again for as long as the root cannot be reached."""
        delay_s = REOPEN_FIRST_S
        config = msgspec.json.decode(request.options, type=StoreConfig)
        fields = msgspec.json.decode(request.namespace) if request.namespace else None
        self._send(Opened(state="opening", reason=f"opening {request.root}"))
        assert self._arena is not None, "configured before"
        self._arena.populate()
        while not self._leaving.is_set():
            try:
                store = _open_as_permitted(request, fields, config, gone=self._tell_gone)
            except (PrefixStoreError, OSError) as error:
                self._send(Opened(state="off", reason=str(error)))
                self._leaving.wait(delay_s)
                delay_s = min(2 * delay_s, REOPEN_LONGEST_S)
                continue
            self._store = store
            state: State = "read_only" if store.read_only else "on"
            self._send(Opened(state=state, reason=f"serving {request.root}"))
            return

    def _tell_gone(self, keys: Sequence[Key]) -> None:
        self._send(Gone(keys=[bytes(key) for key in keys]))

    def _answer(self, request: Request) -> Reply | None:
        """Answer one request; an exception here is a bug of ours and still gets its reply."""
        try:
            return self._reply_to(request)
        except Exception:
            logger.exception("answering %s", type(request).__name__)
            return _refuse(request, "error")

    def _reply_to(self, request: Request) -> Reply | None:
        store = self._store
        if store is None:
            return _refuse(request, "off")
        # A store is never too late: its bytes lie complete in the arena, and somebody may want them.
        if isinstance(request, Find | Load) and self._is_late(request):
            return _refuse(request, "timeout")
        match request:
            case Find():
                return _find(store, request)
            case Load():
                return self._load(store, request)
            case Store():
                return self._store_chunk(store, request)
            case Touch():
                store.touch([Key(key) for key in request.keys])
                return None
            case _:
                raise AssertionError(f"{type(request).__name__} is not for a pool")

    def _is_late(self, request: Find | Load) -> bool:
        return request.deadline_s < self._clock.monotonic_s()

    def _load(self, store: PrefixStore, request: Load) -> Loaded:
        assert self._arena is not None, "configured before the first load"
        started_s = self._clock.monotonic_s()
        outcome = store.load(
            Key(request.key), self._arena.buffer(request.buffer), raw_bytes=request.raw_bytes
        )
        elapsed_s = self._clock.monotonic_s() - started_s
        if isinstance(outcome, Miss):
            return Loaded(
                ticket=request.ticket, reason=outcome.reason, stored_bytes=0, elapsed_s=elapsed_s
            )
        return Loaded(
            ticket=request.ticket,
            reason=None,
            stored_bytes=outcome.stored_bytes,
            elapsed_s=elapsed_s,
        )

    def _store_chunk(self, store: PrefixStore, request: Store) -> Stored:
        assert self._arena is not None, "configured before the first store"
        started_s = self._clock.monotonic_s()
        chunk = Chunk(
            key=Key(request.key),
            parent=Key(request.parent) if request.parent is not None else None,
            end_token=request.end_token,
        )
        outcome = store.store(
            chunk,
            self._arena.buffer(request.buffer),
            raw_bytes=request.raw_bytes,
            element_bytes=request.element_bytes,
        )
        return Stored(
            ticket=request.ticket,
            existed=outcome.existed,
            reason=outcome.reason,
            stored_bytes=outcome.stored_bytes,
            elapsed_s=self._clock.monotonic_s() - started_s,
        )

    def _report_counters(self) -> None:
        last: dict[str, int] = {}
        while not self._leaving.wait(COUNTERS_INTERVAL_S):
            store = self._store
            values = store.counters() if store is not None else {}
            if values != last:
                self._send(Counters(values=values))
                last = values

    def _send(self, reply: Reply) -> None:
        frame = encode_frame(reply)
        # A failed send means that the engine is gone; the main thread learns it by itself.
        with self._send_lock, contextlib.suppress(OSError):
            self._stream.sendall(frame)

    def _finish(self) -> None:
        self._leaving.set()
        until_s = self._clock.monotonic_s() + FINISH_S
        for pool in self._pools:
            pool.finish(until_s=until_s, clock=self._clock)
        if self._store is not None:
            self._store.close()


def _open_as_permitted(
    request: Configure,
    fields: Fields | None,
    config: StoreConfig,
    *,
    gone: Callable[[Sequence[Key]], None],
) -> PrefixStore:
    """Open a root for writing, or for reading only where no more is allowed."""

    def opened(config: StoreConfig) -> PrefixStore:
        return PrefixStore.open(
            request.root,
            namespace=fields,
            config=config,
            create=request.create,
            discard_index=request.discard_index,
            gone=gone,
        )

    if config.read_only:
        return opened(config)
    try:
        store = opened(config)
        try:
            store.root.check_writable()
        except BaseException:
            store.close()
            raise
    except FullError:
        return opened(config)  # Stores are skipped until there is room; the store sees to that.
    except UnavailableError as error:
        if error.errno not in READ_ONLY_ERRNOS:
            raise
        logger.info("opening %s for reading only: %s", request.root, error)
        return opened(msgspec.structs.replace(config, read_only=True))
    return store


def _find(store: PrefixStore, request: Find) -> Found:
    keys = [Key(key) for key in request.keys]
    if request.chained:
        count = store.longest_prefix(keys)
        return Found(ticket=request.ticket, present=b"\1" * count + bytes(len(keys) - count))
    return Found(ticket=request.ticket, present=bytes(store.contains(keys)))


def _refuse(request: Request, reason: str) -> Reply | None:
    """Answer that nothing was found, loaded or stored."""
    match request:
        case Find():
            return Found(ticket=request.ticket, present=bytes(len(request.keys)))
        case Load():
            return Loaded(ticket=request.ticket, reason=reason, stored_bytes=0, elapsed_s=0.0)
        case Store():
            return Stored(
                ticket=request.ticket, existed=False, reason=reason, stored_bytes=0, elapsed_s=0.0
            )
        case _:
            return None


def main() -> None:
    """Run the I/O process on the file descriptors named in the arguments."""
    *sockets, arena_fd = (int(argument) for argument in sys.argv[1:])
    logging.basicConfig(format="%(levelname)s prefixstore: %(message)s")
    # An interrupt of the terminal is the engine's to answer; it then stops us in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        stream, loads, stores = (stack.enter_context(socket.socket(fileno=fd)) for fd in sockets)
        Server(stream, arena_fd, loads=loads, stores=stores, clock=SystemClock()).run()


if __name__ == "__main__":
    main()
