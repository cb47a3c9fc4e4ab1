"""What the collector removes besides chunks: orphans, old accounts, old history; each for itself."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.store import PrefixStore
from prefixstore.store.usage import INTERVAL_S
from prefixstore.testing.chains import FILE_BYTES, chain, store_chain
from prefixstore.testing.clock import ManualClock
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs

OpenStore = Callable[..., PrefixStore]

QUOTA = {"max_bytes": 1000 * FILE_BYTES}
DAYS_S = 3 * 86400.0


def make_old(path: Path) -> None:
    """Date a file back."""
    os.utime(path, (time.time() - DAYS_S,) * 2)


def old_account(open_store: OpenStore, clock: ManualClock) -> Path:
    """Leave the account of a writer that is long gone, and a scan that has met it."""
    with open_store(config=QUOTA, clock=clock, index=None) as store:
        store_chain(store, chain("gone", 3))
        collector = Path(store.root.layout.collector)
        clock.advance(INTERVAL_S)
        store.work()
        store.reconcile()
        (account,) = collector.glob(f"usage-{store.tree.writer}.json")
    make_old(account)
    return account


def test_a_pass_of_a_collector_that_has_just_come_forgets_accounts(open_store: OpenStore) -> None:
    """``gc --watch`` opens the root anew for each pass: it has heard of nobody when it reaps."""
    clock = ManualClock(start_s=time.time())
    account = old_account(open_store, clock)
    with open_store(config=QUOTA, clock=clock, index=None, namespace=None) as store:
        store.collect()

    assert not account.exists()


@pytest.mark.parametrize("broken", ["ns", "collector", "history"])
def test_what_cannot_be_reaped_keeps_nothing_else(
    open_store: OpenStore, root: str, broken: str
) -> None:
    """A directory that cannot be read is told of, and the others are seen to."""
    clock = ManualClock(start_s=time.time())
    account = old_account(open_store, clock)
    calls = FaultyOs(QuickOs())
    store = open_store(config=QUOTA, clock=clock, index=None, os_calls=calls)
    document = Path(root) / "writers" / f"x.json.{'0' * 32}.tmp"
    history = Path(root) / "history" / f"20200101-{'0' * 32}.json"
    history.parent.mkdir(exist_ok=True)
    for path in (document, history):
        path.touch()
    make_old(document)
    calls.reset(
        When(
            fault=Fail(errno.EIO),
            name="scan",
            matches=lambda call: call.path == f"{root}/{broken}",
            forever=True,
        )
    )
    store.collect()

    left = {"ns": document, "collector": account, "history": history}
    assert {name: path.exists() for name, path in left.items()} == {
        name: name == broken for name in left
    }
