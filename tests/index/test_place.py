"""Where an index may live, and who shares it with whom."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prefixstore.clock import SystemClock
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.index import place
from prefixstore.index.filesystems import LOCAL, NOT_LOCAL, filesystem_of, named
from prefixstore.index.lmdb_index import LmdbIndex
from prefixstore.index.place import Host, claim_seat, default_index_dir, this_host
from prefixstore.testing.index_contract import ONE, chain, entries

BOOT = "00000000-1111-2222-3333-444444444444"
OTHER_BOOT = "99999999-1111-2222-3333-444444444444"
HERE = Host(boot_id=BOOT, pid_namespace="4026531836")
THERE = Host(boot_id=BOOT, pid_namespace="4026532000")


def claim(base, *, host=HERE, store_id="store", **options):
    """Claim a seat as one process would."""
    return claim_seat(base, store_id=store_id, host=host, clock=SystemClock(), **options)


def on(magic):
    """Return a probe that finds every path on the filesystem of ``magic``."""
    return lambda _path: named(magic)


@pytest.mark.parametrize("magic", [*NOT_LOCAL, 0x12345678], ids=hex)
def test_network_filesystems_are_refused(tmp_path, magic):
    """The refusal names the path, the filesystem and the setting; and nothing was made."""
    with pytest.raises(InvalidError) as refusal:
        claim(tmp_path / "a" / "b", filesystem=on(magic))
    for word in (str(tmp_path / "a" / "b"), named(magic).name, "index_dir"):
        assert word in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("magic", LOCAL, ids=hex)
def test_local_filesystems_are_taken(tmp_path, magic):
    """Filesystems of one kernel are fine."""
    with claim(tmp_path, filesystem=on(magic)) as seat:
        assert seat.path.is_dir()


def test_a_mount_below_is_seen(tmp_path):
    """What counts is where the files would lie, not where the setting points."""

    def filesystem(path):
        return named(0x6969 if path.name == BOOT else 0xEF53)

    with pytest.raises(InvalidError, match="nfs"):
        claim(tmp_path, filesystem=filesystem)


def test_statfs_knows_this_machine():
    """The kernel's own answers: proc is no place, shared memory is one."""
    assert not filesystem_of(Path("/proc")).local
    assert filesystem_of(Path("/dev/shm")).name == "tmpfs"
    with pytest.raises(UnavailableError, match="nowhere"):
        filesystem_of(Path("/nowhere"))


def test_this_host():
    """The facts are the kernel's."""
    host = this_host()
    assert place.BOOT_ID.fullmatch(host.boot_id)
    assert int(host.pid_namespace) == Path("/proc/self/ns/pid").stat().st_ino


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/prefixstore/index"),
        ({"HOME": "/h"}, "/h/.cache/prefixstore/index"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/prefixstore/index"),
    ],
)
def test_default_directory(environ, expected):
    """The user's cache directory, as the desktop standard names it."""
    assert Path(expected) == default_index_dir(environ)


def test_no_default_directory():
    """Without a home there is no default, and the error says what to set."""
    with pytest.raises(InvalidError, match="index_dir"):
        default_index_dir({"HOME": ""})


def test_one_namespace_shares_a_seat(tmp_path):
    """Processes that see each other's pids use one environment."""
    with claim(tmp_path) as one, claim(tmp_path) as two:
        assert one.path == two.path
        assert one.path.parts[-3:] == ("store", BOOT, "seat-0")


def test_another_namespace_gets_another_seat(tmp_path):
    """Pids that mean different processes never meet in one environment."""
    with claim(tmp_path) as one, claim(tmp_path, host=THERE) as two, claim(tmp_path) as three:
        assert [one.number, two.number, three.number] == [0, 1, 0]


def test_siblings_find_each_other(tmp_path):
    """A process joins its namespace's seat even where a lower one has become free."""
    first = claim(tmp_path)
    second = claim(tmp_path, host=THERE)
    first.close()
    with claim(tmp_path, host=THERE) as third:
        assert second.path == third.path
    second.close()


def test_a_free_seat_is_taken_over_warm(tmp_path):
    """A restarted container finds the rows of its predecessor, although its namespace is new."""
    keys = chain(3)
    with LmdbIndex.open(tmp_path, store_id="store", host=HERE) as index:
        index.put_many(entries(keys, used_s=1))
    with LmdbIndex.open(tmp_path, store_id="store", host=THERE) as index:
        assert index.known_prefix(ONE, keys) == 3


def test_stores_are_apart(tmp_path):
    """Each store has its own index."""
    with claim(tmp_path) as one, claim(tmp_path, store_id="other") as two:
        assert one.path != two.path


def test_another_boot_is_discarded(tmp_path):
    """After a reboot the index starts empty and the old file is gone, unopened."""
    later = Host(boot_id=OTHER_BOOT, pid_namespace=HERE.pid_namespace)
    with LmdbIndex.open(tmp_path, store_id="store", host=HERE) as index:
        index.put_many(entries(chain(3), used_s=1))
    with LmdbIndex.open(tmp_path, store_id="store", host=later) as index:
        assert index.totals() == {}
    assert [path.name for path in (tmp_path / "store").iterdir()] == [OTHER_BOOT]


def test_only_boots_are_discarded(tmp_path):
    """Whatever else lies there stays."""
    with claim(tmp_path):
        pass
    (tmp_path / "store" / "notes").mkdir()
    (tmp_path / "store" / "readme.txt").write_text("mine")
    with claim(tmp_path, host=Host(boot_id=OTHER_BOOT, pid_namespace="1")):
        left = {path.name for path in (tmp_path / "store").iterdir()}
        assert {OTHER_BOOT, "notes", "readme.txt"} == left


def test_a_boot_in_use_stays(tmp_path):
    """A container that is shown a made-up boot id loses nothing while it lives."""
    later = Host(boot_id=OTHER_BOOT, pid_namespace="1")
    with claim(tmp_path) as seat, claim(tmp_path, host=later):
        assert seat.path.is_dir()
    with claim(tmp_path, host=later):
        assert not seat.path.exists()


def test_seats_run_out(tmp_path):
    """Beyond the limit a container is told to go without, and why."""
    held = [
        claim(tmp_path, host=Host(boot_id=BOOT, pid_namespace=str(at)))
        for at in range(place.SEATS_MAX)
    ]
    with pytest.raises(UnavailableError, match="index_dir"):
        claim(tmp_path)
    held[7].close()
    with claim(tmp_path) as seat:
        assert seat.number == 7
    for seat in held:
        seat.close()


def test_directories_are_private(tmp_path):
    """Nobody else may read or write what LMDB trusts."""
    with claim(tmp_path / "base") as seat:
        for path in (tmp_path / "base", *seat.path.parents[:2], seat.path):
            assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("forge", ["writable", "link", "file"])
def test_forged_directories_are_refused(tmp_path, forge):
    """A directory that others could have filled is not used."""
    store = tmp_path / "store"
    if forge == "writable":
        store.mkdir()
        store.chmod(0o777)
    elif forge == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        store.symlink_to(tmp_path / "elsewhere")
    else:
        store.write_text("")
    with pytest.raises(InvalidError, match="must be a directory that only"):
        claim(tmp_path)


def test_lock_files_follow_no_links(tmp_path):
    """A link in place of a lock file is not written through."""
    with claim(tmp_path) as seat:
        boot = seat.path.parent
    (boot / "seat-0.lock").unlink()
    (tmp_path / "victim").write_text("precious")
    (boot / "seat-0.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UnavailableError, match="index_dir"):
        claim(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_in_the_way(tmp_path):
    """A path that cannot be a directory is an environment problem, told with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="file"):
        claim(tmp_path / "file" / "base")


@pytest.mark.parametrize("store_id", ["", "..", "a/b", "x" * 65, "-a"])
def test_store_ids_are_names(tmp_path, store_id):
    """A store id never leads out of the directory."""
    with pytest.raises(InvalidError):
        claim(tmp_path, store_id=store_id)


def test_removed_while_held(tmp_path):
    """Removing the directory by hand costs the holder nothing; the next opening makes a new one."""
    keys = chain(2)
    with LmdbIndex.open(tmp_path / "base", store_id="store") as index:
        index.put_many(entries(keys, used_s=1))
        shutil.rmtree(tmp_path / "base")
        assert index.known_prefix(ONE, keys) == 2
        with LmdbIndex.open(tmp_path / "base", store_id="other") as other:
            assert other.totals() == {}
    with LmdbIndex.open(tmp_path / "base", store_id="store") as index:
        assert index.totals() == {}


def test_many_processes_claim_at_once(tmp_path, children):
    """Of one namespace all get the same seat, however close they start."""

    def claim_and_note():
        with claim(tmp_path / "base") as seat:
            (tmp_path / f"claimed-{os.getpid()}").write_text(str(seat.number))
            signal.pause()

    pids = [children.start(claim_and_note) for _ in range(8)]
    names = [tmp_path / f"claimed-{pid}" for pid in pids]
    while not all(name.exists() and name.read_text() for name in names):
        assert children.failures() == []
    assert {"0"} == {name.read_text() for name in names}


CONTAINER = """
    import sys
    from prefixstore.index.lmdb_index import LmdbIndex
    from prefixstore.testing.index_contract import ONE, chain, check_counts, entries

    with LmdbIndex.open(sys.argv[1], store_id="store") as index:
        keys = chain(100, seed=int(sys.argv[2]))
        index.put_many(entries(keys, used_s=1))
        print(index.seat_number, flush=True)
        sys.stdin.readline()
        assert index.known_prefix(ONE, keys) == 100
        index.touch_many(ONE, keys, used_s=2)
        check_counts(index)
        print(len(list(index.scan())), flush=True)
"""


def container(base, seed):
    """Start the script above as pid 1 of a PID namespace of its own."""
    script = textwrap.dedent(CONTAINER)
    return subprocess.Popen(
        ["unshare", "--pid", "--fork", sys.executable, "-c", script, str(base), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def can_unshare():
    """Say whether this user may make PID namespaces."""
    command = ["unshare", "--pid", "--fork", "true"]
    return (
        shutil.which("unshare")
        and not subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
    )


@pytest.mark.skipif(not can_unshare(), reason="this user may not make PID namespaces")
def test_two_containers(tmp_path):
    """Two processes that both are pid 1 use one directory at the same time, and do not meet."""
    with container(tmp_path, 1) as one, container(tmp_path, 2) as two:
        assert {"0\n", "1\n"} == {one.stdout.readline(), two.stdout.readline()}
        for process in (one, two):
            rest, _ = process.communicate("go on\n")
            assert (rest, process.returncode) == ("100\n", 0)
