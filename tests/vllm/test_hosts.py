"""Real engines on two mounts of one volume, as on two hosts: one root, one quota, one bad day each.

What is on the root is seen on the server's own disk, past all caches; what the engines announce, by a
subscriber of vLLM's own event stream.
"""

import contextlib
import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.sharedfs.gluster import PREFIX, Volume, prepare
from tests.vllm import stores
from tests.vllm.conftest import NewPlace
from tests.vllm.engine import Engine
from tests.vllm.stores import FLOAT32, FORKED, LONG, OTHER, PROMPTS, TINY_CHUNK_BYTES, Reference

VOLUME_BYTES = 40 * 2**20
QUOTA_CHUNKS = 30
BLOB_BYTES = TINY_CHUNK_BYTES + 4096
NEW = [stores.tokens(600 + i, 5 * stores.BLOCK_TOKENS + 9) for i in range(5)]
"""Prompts of five chunks each that nobody has seen."""
HANG = {"find_deadline_s": 0.5, "load_deadline_s": 1.0, "store_deadline_s": 1.0, "drain_s": 2.0}
"""The deadlines, shortened so that a test sees each of them pass; a hung process is replaced after 2 s."""
PROCESSES_MAX = 4
"""One that serves, and three that a hung mount has not let go of."""


@pytest.fixture
def volume() -> Iterator[Volume]:
    """Give a volume that a test can fill, with the mounts ``a`` and ``b``."""
    prepare()
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/dev/shm"))
    size = f"size={VOLUME_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "volume", directory], check=True)
    try:
        with closing(Volume(directory)) as volume:
            volume.start()
            volume.mount("a")
            volume.mount("b")
            yield volume
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


class Router:
    """A cache-aware router's ear: what one engine says that storage holds."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe(b"")
        self.believed: set[int] = set()
        self.removed: set[int] = set()
        self._computed: dict[tuple[int, ...], int] = {}

    def listen(self) -> set[int]:
        """Take what was announced since the last call; return the hashes believed to be stored."""
        while self._socket.poll(timeout=0):
            _, _, payload = self._socket.recv_multipart()
            for event in msgspec.msgpack.decode(payload)[1]:
                self._take(event)
        return self.believed

    def _take(self, event: dict[str, Any]) -> None:
        hashes = event["block_hashes"]
        match event["type"], event["medium"]:
            case "BlockStored", "GPU":
                blocks = zip(*[iter(event["token_ids"])] * stores.BLOCK_TOKENS, strict=True)
                self._computed.update(zip(blocks, hashes, strict=True))
            case "BlockStored", "STORAGE":
                self.believed.update(hashes)
            case "BlockRemoved", "STORAGE":
                self.believed.difference_update(hashes)
                self.removed.update(hashes)

    def hashes_of(self, prompt: Sequence[int]) -> set[int]:
        """Return the hashes of the full blocks of a prompt that the engine has computed."""
        starts = range(0, len(prompt) - stores.BLOCK_TOKENS + 1, stores.BLOCK_TOKENS)
        blocks = [tuple(prompt[at : at + stores.BLOCK_TOKENS]) for at in starts]
        return {self._computed[block] for block in blocks}

    def close(self) -> None:
        """Stop listening."""
        self._socket.close(linger=0)


def hashes_on(disk: Path) -> set[int]:
    """Return the block hashes of the blobs on a disk, as vLLM names them in events."""
    keys = (bytes.fromhex(path.stem) for path in disk.glob("root/ns/*/*/*/*.kv"))
    return {int.from_bytes(key[:-4], "big") & (2**64 - 1) for key in keys}


def holders(disk: Path) -> list[str]:
    """Return who has evicted from a root, in order."""
    epochs = sorted(disk.glob(f"root/collector/{'[0-9a-f]' * 16}.*"))
    return [msgspec.json.decode(path.read_bytes())["holder"] for path in epochs]


def writer_pid(disk: Path, writer: str) -> int:
    """Return the process that a writer says it is."""
    pid: int = msgspec.json.decode((disk / f"root/writers/{writer}.json").read_bytes())["pid"]
    return pid


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill a disk to the last page for the length of a block."""
    ballast = disk.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            pass
    try:
        yield
    finally:
        ballast.unlink()


def children(engine: Engine) -> list[int]:
    """Return the processes that an engine has started and not reaped, those that hang among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == engine.pid:
                found.append(int(path.parent.name))
    return found


def step(engine: Engine) -> None:
    """Have an engine step some times, as any request does."""
    engine.generate([[5]], max_tokens=2)


def test_one_engine_warms_another_and_each_outlives_what_befalls_the_root(
    volume: Volume, new_place: NewPlace, tiny_llama: Path, alone: Reference, tmp_path: Path
) -> None:
    """Hits across hosts, events, a full disk, and a new collector when the first one's engine is killed."""
    quota = {"max_bytes": QUOTA_CHUNKS * BLOB_BYTES}
    endpoint = f"ipc://{tmp_path}/events"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    place_a, place_b = (
        new_place(root=volume.mounts[name].path / "root", **quota) for name in ("a", "b")
    )
    with closing(Router(endpoint)) as router:
        a = place_a.engine(tiny_llama, llm={**FLOAT32, "kv_events_config": events})
        a.generate_each(PROMPTS)
        stores.until(lambda: len(hashes_on(volume.brick)) == stores.CHUNKS, "the chunks")
        b = place_b.engine(tiny_llama)
        warm = b.generate_each(PROMPTS)
        new = a.generate_each(NEW[:4])

        def agrees() -> bool:
            step(a)
            on_disk = hashes_on(volume.brick)
            return (
                router.listen() == on_disk
                and bool(router.removed)
                and router.hashes_of(NEW[3]) <= on_disk
            )

        stores.until(agrees, "the announcements to agree with the disk", patience_s=60)

    assert list(stores.PROMPT_CHUNKS) == stores.cached_chunks(warm)
    assert stores.outputs(alone.cold) == stores.outputs(warm)

    # Full to the last page: nothing is stored until an eviction has made room, and both serve on.
    evictions = len(holders(volume.brick))
    with full(volume.brick):
        loaded = b.generate_each(NEW[3:4])
        computed = [engine.generate_each(NEW[4:]) for engine in (a, b)]
        stores.until(
            lambda: _skipped(a) + _skipped(b) > 0 or len(holders(volume.brick)) > evictions,
            "a skipped store, or room made by an eviction",
        )
    assert [5] == stores.cached_chunks(loaded)
    assert stores.outputs(new[3:]) == stores.outputs(loaded)
    assert stores.outputs(computed[0]) == stores.outputs(computed[1])

    # The engine that evicted last is killed; the other one makes room for what it stores.
    collector = holders(volume.brick)[-1]
    killed, left = (a, b) if writer_pid(volume.brick, collector) in children(a) else (b, a)
    killed.kill()
    seeds = itertools.count(700)

    def evicts() -> bool:
        left.generate([stores.tokens(next(seeds), 300)])
        is_within_quota = len(hashes_on(volume.brick)) <= QUOTA_CHUNKS
        return holders(volume.brick)[-1] != collector and is_within_quota

    stores.until(evicts, "the other engine to evict", patience_s=60)
    assert stores.outputs(alone.cold[2:]) == stores.outputs(left.generate([OTHER]))
    assert stores.labelled(left, "vllm:prefixstore_failed_callbacks", "callback") == {}
    left.quit()


def _skipped(engine: Engine) -> float:
    step(engine)
    skipped = stores.labelled(engine, "vllm:prefixstore_stores_skipped", "reason")
    return sum(skipped.values())


def test_an_engine_on_a_hung_mount_recomputes_and_has_its_hits_back(
    volume: Volume, new_place: NewPlace, filled_root: Path, tiny_llama: Path, alone: Reference
) -> None:
    """Requests, processes and the end are bounded while the mount hangs; what was skipped is stored later."""
    mount = volume.mounts["a"]
    subprocess.run(["cp", "-a", filled_root, mount.path / "root"], check=True)
    place = new_place(root=mount.path / "root", **HANG)
    unseen = stores.tokens(610, 300)
    engine = place.engine(tiny_llama)
    before = engine.generate([OTHER])
    others = len(children(engine)) - 1
    most = 0
    with mount.hanging(limit_s=100):
        hung = engine.generate([FORKED])
        engine.generate([unseen])
        end_s = time.monotonic() + 10
        while time.monotonic() < end_s:
            step(engine)
            most = max(most, len(children(engine)))
            time.sleep(0.2)
    stores.await_state(engine, "on", patience_s=60)
    back = engine.generate([LONG])

    def stored() -> bool:
        step(engine)
        return len(hashes_on(volume.brick)) == stores.CHUNKS + 2

    stores.until(stored, "the chunks that were skipped")
    assert [3, 0, 13] == stores.cached_chunks([*before, *hung, *back])
    assert stores.outputs(alone.cold) == stores.outputs([*back, *hung, *before])
    assert 1 <= most - others <= PROCESSES_MAX
    with mount.hanging(limit_s=100):
        engine.generate([stores.tokens(611, 300)])
        engine.quit()
