"""Past the page cache where the root allows it; and what a tree does when the ground moves."""

import errno
import os
from pathlib import Path

import pytest

from prefixstore.config import Codec
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.testing.faults import Cut, Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from tests.tree.trees import Fixture, key_of, payload_of

KEY = key_of("one")


class PageCacheOs(QuickOs):
    """A filesystem that refuses O_DIRECT, when a file is opened or when it is used."""

    def __init__(self, *, refuses: str, error: int = errno.EINVAL) -> None:
        self._refuses = refuses
        self._error = error
        self._direct: set[int] = set()
        self.refusals = 0

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Refuse O_DIRECT, or note it."""
        if flags & os.O_DIRECT and self._refuses == "open":
            self._refuse()
        # What is asked for here is not what the machine's filesystem can do.
        fd = super().open(path, flags & ~os.O_DIRECT, mode)
        (self._direct.add if flags & os.O_DIRECT else self._direct.discard)(fd)
        return fd

    def read_into(self, fd: int, target: memoryview, offset: int) -> int:
        """Refuse to read past the page cache."""
        if self._refuses == "read_into" and fd in self._direct:
            self._refuse()
        return super().read_into(fd, target, offset)

    def write_from(self, fd: int, source: memoryview, offset: int) -> int:
        """Refuse to write past the page cache."""
        if self._refuses == "write_from" and fd in self._direct:
            self._refuse()
        return super().write_from(fd, source, offset)

    def _refuse(self) -> None:
        self.refusals += 1
        raise OSError(self._error, os.strerror(self._error))


@pytest.mark.parametrize("refuses", ["open", "read_into", "write_from"])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_one_refusal_ends_direct_io(tmp_path, refuses, error):
    """Whichever call says no: the tree goes on through the page cache and asks no more."""
    calls = PageCacheOs(refuses=refuses, error=error)
    here = Fixture(str(tmp_path / "root"), calls, {"direct_io": "auto"})
    assert here.tree.direct_io

    for name in ("one", "two"):
        assert not here.store(key_of(name)).existed
        assert here.load(key_of(name)) == payload_of(key_of(name))

    assert calls.refusals == 1
    assert not here.tree.direct_io
    assert here.temporaries() == []


def test_a_read_only_tree_reads_past_the_page_cache(tmp_path):
    """It needs no probe that writes: the first refusal is early enough."""
    Fixture(str(tmp_path / "root")).store(KEY)
    calls = PageCacheOs(refuses="nothing")
    reader = Fixture(str(tmp_path / "root"), calls, {"direct_io": "auto", "read_only": True})

    assert reader.load(KEY) == payload_of(KEY)
    assert reader.tree.direct_io


@pytest.mark.parametrize("refuses", ["open", "read_into", "write_from"])
def test_a_demand_that_cannot_be_met_is_told_at_open(tmp_path, refuses):
    """Whoever writes "on" wants to know, and the probe leaves nothing behind."""
    with pytest.raises(InvalidError, match="refuses O_DIRECT"):
        Fixture(str(tmp_path / "root"), PageCacheOs(refuses=refuses), {"direct_io": "on"})

    assert list((tmp_path / "root" / "writers").iterdir()) == []


def test_an_error_that_is_no_refusal_changes_nothing(tmp_path):
    """A full or failing disk is no reason to use the page cache."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty, {"direct_io": "auto"})
    for error in (errno.ENOSPC, errno.EIO):
        faulty.reset(When(name="write_from", nth=1, fault=Fail(error)))
        with pytest.raises(OSError, match="cannot store"):
            here.store(KEY)

    assert here.tree.direct_io


@pytest.mark.parametrize("direct_io", ["auto", "off"])
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9999])
def test_a_read_that_is_cut_short_is_taken_up_again(tmp_path, direct_io, codec, share):
    """Inside a page as well, where reading past the page cache cannot go on but from its start."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty, {"direct_io": direct_io})
    here.store(KEY, codec=codec)
    faulty.reset(When(name="read_into", nth=1, fault=Cut(share)))

    assert here.load(KEY) == payload_of(KEY)


def test_reads_that_get_nowhere_end(tmp_path):
    """A filesystem that gives a little less each time is given up on."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    here.store(KEY)
    faulty.reset(When(name="read_into", nth=1, forever=True, fault=Cut(0.01)))

    assert here.load(KEY) == "torn"
    assert faulty.count("read_into") < 1000


@pytest.mark.parametrize("name", ["stat", "open", "read_into"])
@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_a_blob_that_cannot_be_looked_at_is_not_replaced(tmp_path, name, error):
    """Not to see what is there is no reason to rename over it."""
    faulty = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), faulty)
    here.store(KEY)
    inode = here.file_of(KEY).stat().st_ino
    faulty.reset(When(name=name, nth=1, fault=Fail(error)))

    with pytest.raises(UnavailableError):
        here.store(KEY)

    assert here.file_of(KEY).stat().st_ino == inode


def test_a_store_builds_nothing_under_a_mount_point_that_lost_its_mount(tmp_path):
    """An empty directory where the root was: stores fail, and the disk below stays empty."""
    here = Fixture(str(tmp_path / "root"))
    here.store(KEY)
    (tmp_path / "root").rename(tmp_path / "unmounted")
    (tmp_path / "root").mkdir()

    with pytest.raises(UnavailableError, match="is the filesystem mounted"):
        here.store(key_of("two"))

    assert list((tmp_path / "root").iterdir()) == []
    assert here.load(KEY) == "absent"


def test_a_name_that_a_forked_process_took_is_left_to_it(tmp_path):
    """A child inherits its parent's writer id and counter; neither harms the other's files."""
    here = Fixture(str(tmp_path / "root"))
    taken = here.root.layout.temporary(here.namespace, KEY, writer=here.tree.writer, number=0)
    here.file_of(KEY).parent.mkdir(parents=True)
    with Path(taken).open("wb") as theirs:
        theirs.write(b"half a blob")
        theirs.flush()

        assert not here.store(KEY).existed

        assert here.temporaries() == [taken]
    assert here.load(KEY) == payload_of(KEY)


def test_a_full_durability_syncs_the_names_above_once(tmp_path):
    """Directories that somebody else has made are put on the disk, too, by whoever relies on them."""
    maker = Fixture(str(tmp_path / "root"))
    maker.store(KEY)
    maker.file_of(KEY).unlink()
    counting = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), counting, {"durability": "full"})
    syncs = []
    for _ in range(2):
        counting.reset()
        here.store(KEY)
        syncs.append(counting.count("sync"))
        here.file_of(KEY).unlink()

    assert syncs == [3, 1]
