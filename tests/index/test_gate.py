"""The gate lets many through, or one alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from prefixstore.index.gate import Gate


def test_sharers_do_not_wait_for_each_other():
    """Two threads are inside at the same time."""
    gate, meeting = Gate(), threading.Barrier(2)

    def pass_through():
        with gate.shared():
            meeting.wait(10)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(pass_through) for _ in range(2)]:
            future.result()
    assert gate.is_idle()


def test_alone_is_alone():
    """Whoever asks to be alone meets nobody inside, in any mixture of threads."""
    gate, inside, clashes = Gate(), [], []

    def share():
        for _ in range(300):
            with gate.shared():
                inside.append(1)
                inside.pop()

    def be_alone():
        for _ in range(100):
            with gate.alone():
                if inside:
                    clashes.append(list(inside))
                inside.append(2)
                time.sleep(0)
                if inside != [2]:
                    clashes.append(list(inside))
                inside.pop()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work) for work in (share, share, share, be_alone, be_alone)]:
            future.result()
    assert clashes == []
    assert gate.is_idle()


def test_who_asks_alone_goes_first():
    """New sharers queue behind a thread that waits to be alone."""
    gate, order = Gate(), []
    with ThreadPoolExecutor(2) as pool:
        with gate.shared():
            alone = pool.submit(lambda: enter(gate.alone(), order, "alone"))
            while not gate._taken:
                time.sleep(0.001)
            assert not gate.is_idle()
            late = pool.submit(lambda: enter(gate.shared(), order, "late"))
            time.sleep(0.02)
            assert order == []
        alone.result(10)
        late.result(10)
    assert order == ["alone", "late"]


def enter(door, order, name):
    with door:
        order.append(name)
