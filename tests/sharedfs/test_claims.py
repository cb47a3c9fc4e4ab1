"""Claims of prefill between two mounts: caches and latencies that are real."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from prefixstore.keys import Key, NamespaceId
from prefixstore.ops.claims import Claims
from prefixstore.testing.chains import chain
from prefixstore.tree.root import Root
from prefixstore.tree.writers import this_process
from tests.sharedfs.hosts import Hosts, until

NAMESPACE = NamespaceId("ab" * 16)


def claims_on(root: Path, host: str) -> Claims:
    """Return a host's claims; no host can prove anything of another's processes."""
    this = msgspec.structs.replace(this_process(), host=host)
    return Claims(Root.create(str(root)), NAMESPACE, this=this)


def test_two_hosts_that_claim_at_once(hosts: Hosts) -> None:
    """Each chunk is won by one of them, whatever their caches say."""
    keys = chain("race", 40)
    one, other = claims_on(hosts.a, "a"), claims_on(hosts.b, "b")

    def claim(claims: Claims, order: list[Key]) -> set[Key]:
        return {key for key in order if claims.acquire(key)}

    with ThreadPoolExecutor(2) as pool:
        mine = pool.submit(claim, one, keys)
        yours = pool.submit(claim, other, keys[20:] + keys[:20])
        assert mine.result().isdisjoint(yours.result())
        assert len(mine.result() | yours.result()) == 40
    one.close()
    other.close()


def test_what_one_host_lets_go_the_other_has(hosts: Hosts) -> None:
    """Within the time that its mount caches; a living host's claim is not taken meanwhile."""
    (key,) = chain("handed", 1)
    one, other = claims_on(hosts.a, "a"), claims_on(hosts.b, "b")
    assert one.acquire(key)
    assert not other.acquire(key)
    one.release(key)
    until(lambda: other.acquire(key), within_s=hosts.fresh_s)
    assert not one.acquire(key)
    one.close()
    other.close()
