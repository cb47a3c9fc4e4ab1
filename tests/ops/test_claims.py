"""Claims of processes that fill one root together: one wins, the dead are followed, nothing stays behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from prefixstore.keys import NamespaceId
from prefixstore.ops.claims import BEAT_S, PATIENCE_S, Claims
from prefixstore.testing.chains import chain
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.root import Root
from prefixstore.tree.writers import this_process

NAMESPACE = NamespaceId("ab" * 16)
KEY, OTHER = chain("claimed", 2)
ELSEWHERE = msgspec.structs.replace(this_process(), host="elsewhere")

DIES = """
import os, sys
from prefixstore.keys import key_from_hex
from prefixstore.ops.claims import Claims
from prefixstore.tree.root import Root
claims = Claims(Root.open(sys.argv[1]), sys.argv[2])
assert claims.acquire(key_from_hex(sys.argv[3]))
os._exit(9)
"""


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Return a new root."""
    return Root.create(str(tmp_path / "root"))


def beat_file(root: Root, claims: Claims) -> Path:
    """Return the file whose time says that a claimant goes on."""
    return Path(root.layout.prefill, f"{claims.claimant}.json")


def silence(root: Root, claims: Claims, seconds: float) -> None:
    """Let a claimant's last beat be so long ago by the server's clock."""
    path = beat_file(root, claims)
    last_s = path.stat().st_mtime - seconds
    os.utime(path, (last_s, last_s))


def left_behind(root: Root) -> list[Path]:
    """Return the files of claims."""
    return [path for path in Path(root.layout.prefill).rglob("*") if path.is_file()]


def test_a_chunk_is_claimed_once(root: Root) -> None:
    """The second process is refused, takes another chunk, and wins the first when it is let go."""
    with Claims(root, NAMESPACE) as one, Claims(root, NAMESPACE) as two:
        assert one.acquire(KEY)
        assert one.acquire(KEY)
        assert not two.acquire(KEY)
        assert two.acquire(OTHER)
        one.release(KEY)
        assert two.acquire(KEY)
    assert left_behind(root) == []


def test_one_of_many_wins(root: Root) -> None:
    """Sixteen processes at once: each chunk has one claimant."""
    keys = chain("race", 20)
    every = [Claims(root, NAMESPACE) for _ in range(16)]
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda claims: [claims.acquire(key) for key in keys], every))

    assert [sum(row) for row in zip(*won, strict=True)] == [1] * 20


def test_a_silent_host_is_followed_by_one(root: Root) -> None:
    """After its patience, by the server's clock, one of the others has the chunk, and not before."""
    dead = Claims(root, NAMESPACE, this=ELSEWHERE)
    assert dead.acquire(KEY)
    silence(root, dead, PATIENCE_S - 5)
    others = [Claims(root, NAMESPACE) for _ in range(8)]
    early = [claims.acquire(KEY) for claims in others]
    silence(root, dead, 10)
    late = [Claims(root, NAMESPACE) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda claims: claims.acquire(KEY), late))

    assert not any(early)
    assert sum(won) == 1


def test_a_host_with_another_clock_judges_by_the_servers(root: Root) -> None:
    """A process whose own clock counts from elsewhere sees the same beats as young."""
    alive = Claims(root, NAMESPACE, this=ELSEWHERE)
    assert alive.acquire(KEY)
    stranger = Claims(root, NAMESPACE, clock=ManualClock())

    assert not stranger.acquire(KEY)


def test_a_killed_process_of_this_host_is_followed_at_once(root: Root) -> None:
    """Its process id is enough; no patience is needed."""
    words = [sys.executable, "-c", DIES, root.path, NAMESPACE, KEY.hex()]
    done = subprocess.run(words, check=False)
    assert done.returncode == 9
    assert len(left_behind(root)) == 2

    with Claims(root, NAMESPACE) as claims:
        assert claims.acquire(KEY)
    assert left_behind(root) == []


def test_a_beat_keeps_a_claim(root: Root) -> None:
    """A process that goes on is not followed, however old its claim; its lost file comes back."""
    clock = ManualClock()
    mine = Claims(root, NAMESPACE, this=ELSEWHERE, clock=clock)
    assert mine.acquire(KEY)
    silence(root, mine, 2 * PATIENCE_S)
    clock.advance(BEAT_S)
    mine.beat()
    assert not Claims(root, NAMESPACE).acquire(KEY)
    beat_file(root, mine).unlink()
    clock.advance(BEAT_S)
    mine.beat()

    assert not Claims(root, NAMESPACE).acquire(KEY)


def test_a_damaged_claim_is_followed(root: Root) -> None:
    """What nobody can read is nobody's."""
    one = Claims(root, NAMESPACE)
    assert one.acquire(KEY)
    (claim,) = Path(root.layout.prefill, NAMESPACE).iterdir()
    claim.write_bytes(b"{")

    assert Claims(root, NAMESPACE).acquire(KEY)


def test_the_last_one_sweeps_up_and_not_before(root: Root) -> None:
    """What the dead left stays while another process may have to see that they are dead."""
    dead = Claims(root, NAMESPACE, this=ELSEWHERE)
    assert dead.acquire(KEY)
    one, two = Claims(root, NAMESPACE), Claims(root, NAMESPACE)
    silence(root, dead, 2 * PATIENCE_S)
    one.close()
    between = len(left_behind(root))
    two.close()

    assert between == 3
    assert left_behind(root) == []
