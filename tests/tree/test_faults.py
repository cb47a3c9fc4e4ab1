"""The faults that other tests rely on do what they say, and nothing besides."""

import errno
import os
import threading

import pytest

from prefixstore.testing.faults import (
    Cut,
    Fail,
    FaultyOs,
    Hang,
    Kill,
    When,
    faults_of,
    full_disk,
)
from prefixstore.tree.osfs import Os, RealOs, write_whole
from tests.tree.trees import KILLED, in_child

METHODS = [name for name in vars(Os) if not name.startswith("_")]


def write_file(calls: Os, path: str, content: bytes) -> None:
    fd = calls.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        write_whole(calls, fd, memoryview(content))
    finally:
        calls.close(fd)


@pytest.mark.parametrize("name", METHODS)
def test_every_call_of_the_seam_can_fail(name):
    """A method that a fault cannot reach would leave a hole in every sweep."""
    faulty = FaultyOs(RealOs(), When(fault=Fail(errno.EIO), name=name))
    arguments = {
        "open": ("/nonexistent", os.O_RDONLY),
        "read_into": (-1, memoryview(bytearray(1)), 0),
        "write_from": (-1, memoryview(bytearray(1)), 0),
        "link": ("/nonexistent/a", "/nonexistent/b"),
        "rename": ("/nonexistent/a", "/nonexistent/b"),
        "set_mode": ("/nonexistent", 0o600),
    }
    by_descriptor = ("sync_data", "sync", "stat_open")
    fallback = (-1,) if name in by_descriptor else ("/nonexistent",)
    if name == "close":
        fallback = (os.dup(0),)

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        getattr(faulty, name)(*arguments.get(name, fallback))

    assert [call.name for call in faulty.calls] == [name]


def test_the_real_os_and_the_faulty_one_have_the_same_calls():
    """Both implement the seam, whole."""
    assert all(callable(getattr(kind, name)) for kind in (RealOs, FaultyOs) for name in METHODS)


def test_calls_are_counted_in_order_with_their_paths(tmp_path):
    """A sweep names the call that it failed."""
    faulty = FaultyOs(RealOs())

    write_file(faulty, str(tmp_path / "file"), b"content")

    assert [(call.number, call.name) for call in faulty.calls] == [
        (1, "open"),
        (2, "write_from"),
        (3, "close"),
    ]
    assert {call.path for call in faulty.calls} == {str(tmp_path / "file")}
    assert faulty.count("open") == 1


@pytest.mark.parametrize(("share", "length"), [(0.0, 0), (0.5, 8192), (0.9999, 16384)])
def test_a_cut_write_leaves_whole_pages(tmp_path, share, length):
    """As a filesystem's own short write of a large buffer does."""
    faulty = FaultyOs(RealOs(), When(fault=Cut(share), name="write_from"))
    fd = faulty.open(str(tmp_path / "file"), os.O_CREAT | os.O_WRONLY)

    assert faulty.write_from(fd, memoryview(bytes(20_000)), 0) == length

    faulty.close(fd)
    assert (tmp_path / "file").stat().st_size == length


def test_a_full_disk_cuts_then_refuses_and_still_reads(tmp_path):
    """What was on it can be read, and nothing can be added."""
    write_file(RealOs(), str(tmp_path / "old"), b"old")
    faulty = FaultyOs(RealOs(), full_disk(2))

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_file(faulty, str(tmp_path / "new"), bytes(20_000))

    assert (tmp_path / "new").stat().st_size == 8192
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        faulty.link(str(tmp_path / "old"), str(tmp_path / "other"))
    fd = faulty.open(str(tmp_path / "old"), os.O_RDONLY)
    target = bytearray(3)
    assert faulty.read_into(fd, memoryview(target), 0) == 3
    faulty.close(fd)


def test_a_lost_answer_does_the_call_and_reports_a_failure(tmp_path):
    """The file is there, whatever was said."""
    faulty = FaultyOs(RealOs(), When(fault=Fail(errno.EIO, after=True), name="make_directory"))

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        faulty.make_directory(str(tmp_path / "made"))

    assert (tmp_path / "made").is_dir()


def test_a_kill_in_the_middle_of_a_write_leaves_half_of_it(tmp_path):
    """A process that dies does so between two pages."""
    path = str(tmp_path / "file")

    def work() -> None:
        plan = When(fault=Kill(share=0.5), name="write_from")
        write_file(FaultyOs(RealOs(), plan), path, bytes(20_000))

    assert in_child(work) == KILLED
    assert (tmp_path / "file").stat().st_size == 8192


def test_a_hang_waits_until_it_is_let_go(tmp_path):
    """The call is done in the end, as on a mount whose server came back."""
    gate = threading.Event()
    faulty = FaultyOs(RealOs(), When(fault=Hang(gate), name="stat"))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (faulty.stat(str(tmp_path)), done.set()))
    thread.start()

    assert not done.wait(0.05)
    gate.set()
    assert done.wait(5)
    thread.join()


def test_a_forgotten_hang_ends(tmp_path):
    """A test that fails does not hang the run."""
    hang = Hang(threading.Event(), limit_s=0.01)
    faulty = FaultyOs(RealOs(), When(fault=hang, name="stat"))

    with pytest.raises(TimeoutError):
        faulty.stat(str(tmp_path))


def test_conditions_hold_together():
    """Number, name, place and predicate, once or from then on."""
    faulty = FaultyOs(
        RealOs(),
        [
            When(fault=Fail(errno.EIO), name="stat", nth=2),
            When(fault=Fail(errno.EACCES), number=4, forever=True),
            When(fault=Fail(errno.EROFS), matches=lambda call: call.path == "/tmp"),
        ],
    )
    outcomes = []
    for path in ("/", "/", "/", "/", "/", "/tmp"):
        try:
            faulty.stat(path)
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno)

    assert outcomes == [0, errno.EIO, 0, errno.EACCES, errno.EACCES, errno.EACCES]
    faulty.reset()
    faulty.stat("/")
    assert [call.number for call in faulty.calls] == [1]


def test_a_write_that_never_gets_on_is_given_up():
    """A system that takes no byte and reports no error would be asked for ever."""
    faulty = FaultyOs(RealOs(), When(fault=Cut(0.0), name="write_from", forever=True))

    with pytest.raises(OSError, match="wrote 0 of 5 bytes"):
        write_whole(faulty, -1, memoryview(b"bytes"))


def test_faults_fit_their_calls():
    """Kills first; only reads and writes are cut short."""
    assert isinstance(faults_of("stat")[0], Kill)
    assert not any(isinstance(fault, Cut) for fault in faults_of("link"))
    assert any(isinstance(fault, Cut) for fault in faults_of("read_into"))
