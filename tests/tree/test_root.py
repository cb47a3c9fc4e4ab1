"""A root is recognised, never guessed; a namespace is compared whole."""

import errno
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from prefixstore.errors import InvalidError, PrefixStoreError, UnavailableError
from prefixstore.keys import NamespaceId
from prefixstore.testing.faults import Fail, FaultyOs, When
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.limits import LimitsDocument, write_limits
from prefixstore.tree.osfs import Stat
from prefixstore.tree.pins import Pin, Pins
from prefixstore.tree.root import Root, diff_fields
from prefixstore.tree.writers import Writers, this_process
from tests.tree.trees import FIELDS, Fixture, in_children, key_of


def create(path: Path, **options: bool) -> Root:
    return Root.create(str(path), os_calls=QuickOs(), **options)


def reopen(path: Path) -> Root:
    return Root.open(str(path), os_calls=QuickOs())


class FlatOs(QuickOs):
    """A mount that shows the same permissions for all that is on it, as those of other systems' files do."""

    def stat(self, path: str) -> Stat:
        return super().stat(path)._replace(mode=0o660)

    def stat_open(self, fd: int) -> Stat:
        return super().stat_open(fd)._replace(mode=0o660)


def rewrite_identity(path: Path, **changes: object) -> None:
    document = json.loads((path / "store.json").read_bytes())
    (path / "store.json").write_text(json.dumps(document | changes))


def test_a_root_keeps_its_identity(tmp_path):
    """Created once, opened anywhere, created again without harm."""
    root = create(tmp_path / "root")

    assert root.store_id == create(tmp_path / "root").store_id
    assert root.store_id == reopen(tmp_path / "root").store_id
    assert len(bytes.fromhex(root.store_id)) == 16


def test_an_empty_directory_becomes_a_root(tmp_path):
    """A fresh mount has a lost+found; that is empty enough."""
    (tmp_path / "lost+found").mkdir()

    assert create(tmp_path).store_id == reopen(tmp_path).store_id


@pytest.mark.parametrize("name", ["data.bin", "ns", "store.jsonx", ".hidden"])
def test_a_directory_with_something_else_is_refused(tmp_path, name):
    """Nobody's home directory becomes a store by a slip of a path."""
    (tmp_path / name).touch()

    with pytest.raises(InvalidError, match=f"not empty.*{name}"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_opening_makes_no_root(tmp_path):
    """Only creating does; the message says how."""
    with pytest.raises(InvalidError, match="prefixstore init"):
        reopen(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_mount_is_not_a_mistake(tmp_path):
    """A path that is not there may appear: retry. One that is relative never will: fix it."""
    with pytest.raises(UnavailableError, match="is the filesystem mounted"):
        reopen(tmp_path / "missing")
    with pytest.raises(InvalidError, match="absolute"):
        Root.open("relative/root")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": 0},
        {"format": "1"},
        {"fan_out": [256]},
        {"fan_out": [16, 16]},
        {"prefixstore_root": None},
    ],
)
def test_another_format_is_refused(tmp_path, changes):
    """A root is never converted, or filled in, by opening it."""
    create(tmp_path / "root")
    rewrite_identity(tmp_path / "root", **changes)
    before = (tmp_path / "root" / "store.json").read_bytes()

    for attempt in (reopen, create):
        with pytest.raises(InvalidError, match=r"store\.json"):
            attempt(tmp_path / "root")
    assert (tmp_path / "root" / "store.json").read_bytes() == before


def test_fields_of_a_later_minor_version_are_accepted(tmp_path):
    """Rolling upgrades: what an old reader does not know does not stop it."""
    root = create(tmp_path / "root")
    rewrite_identity(tmp_path / "root", comment="later")

    assert reopen(tmp_path / "root").store_id == root.store_id


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"prefixstore_root": "\xff", "format": 1}',
        b"[" * 100_000,
        b'{"prefixstore_root": "' + b"a" * 100 + b'", "format": ' + b"9" * 400 + b"}",
    ],
    ids=["empty", "cut", "null", "list", "utf-16", "no utf-8", "deep", "huge number"],
)
def test_a_damaged_identity_is_refused_by_name(tmp_path, content):
    """Hostile JSON is an error of ours, with the path in it, whatever the parser makes of it."""
    create(tmp_path / "root")
    (tmp_path / "root" / "store.json").write_bytes(content)

    with pytest.raises(InvalidError, match=r"store\.json"):
        reopen(tmp_path / "root")


def test_a_document_that_is_too_long_is_not_read(tmp_path):
    """A sparse file of a terabyte costs no memory."""
    create(tmp_path / "root")
    with (tmp_path / "root" / "store.json").open("r+b") as file:
        file.truncate(2**40)

    with pytest.raises(InvalidError, match="at most"):
        reopen(tmp_path / "root")


def test_racing_creators_agree_on_one_identity(tmp_path):
    """Eight processes make the same root at once; all of them see the same id."""
    seen = tmp_path / "seen"
    seen.mkdir()

    def make(number: int) -> None:
        (seen / str(number)).write_text(create(tmp_path / "root").store_id)

    for _ in range(5):
        assert in_children(8, make) == [0] * 8
        assert len({path.read_text() for path in seen.iterdir()}) == 1
        shutil.rmtree(tmp_path / "root")


def test_a_namespace_is_found_by_its_fields(here):
    """The order of the fields is nobody's concern, and opening twice gives the same."""
    backwards = dict(reversed(list(FIELDS.items())))

    assert here.root.namespace(backwards, create=True) == here.namespace
    assert list(here.root.namespaces()) == [here.namespace]
    manifest = here.root.manifest(here.namespace)
    assert manifest is not None
    assert manifest.fields == FIELDS


def test_a_namespace_is_not_made_by_looking(here):
    """Without ``create``, its name is worked out and nothing is written."""
    identity = here.root.namespace({"model": "other"}, create=False)

    assert identity != here.namespace
    assert not Path(here.root.layout.namespace(identity)).exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "float16"}, "dtype: 'float16' found, 'bfloat16' expected"),
        ({"layout": {"blocks": 2, "heads": [1, 3]}}, r"layout.heads: \[1, 3\] found"),
        ({"layout": {"blocks": 2.0, "heads": [1, 2]}}, "layout.blocks: 2.0 found, 2 expected"),
        ({"layout": {"blocks": True, "heads": [1, 2]}}, "layout.blocks: True found"),
        ({"extra": None}, "extra: None found, nothing expected"),
        ({"model": 7}, "model: 7 found, 'tiny' expected"),
    ],
)
def test_a_manifest_of_other_fields_is_refused_field_by_field(here, changes, told):
    """The name of a namespace is never believed: its manifest is compared whole, in value and type."""
    path = Path(here.root.layout.manifest(here.namespace))
    path.write_bytes(msgspec.json.encode({"fields": FIELDS | changes}))

    with pytest.raises(InvalidError, match=told):
        here.root.namespace(FIELDS, create=True)


def test_a_missing_field_is_told(here):
    """Also one that only the caller has."""
    path = Path(here.root.layout.manifest(here.namespace))
    path.write_bytes(msgspec.json.encode({"fields": {"model": "tiny"}}))

    with pytest.raises(InvalidError, match="dtype: nothing found, 'bfloat16' expected"):
        here.root.namespace(FIELDS, create=True)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"fields": 1}', b"[" * 100_000])
def test_a_damaged_manifest_is_refused_and_not_repaired_silently(here, content):
    """Nobody knows whose bytes lie below it."""
    path = Path(here.root.layout.manifest(here.namespace))
    path.write_bytes(content)

    with pytest.raises(InvalidError, match=r"manifest\.json"):
        here.root.namespace(FIELDS, create=True)
    assert path.read_bytes() == content


def test_a_lost_manifest_is_written_again(here):
    """Whoever opens the namespace knows its fields."""
    Path(here.root.layout.manifest(here.namespace)).unlink()

    assert here.root.namespace(FIELDS, create=True) == here.namespace
    assert here.root.manifest(here.namespace) is not None


def test_namespaces_outside_the_grammar_are_ignored(here, tmp_path):
    """Links, files and strange names below ns/ are no namespaces."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    base = Path(here.root.layout.namespaces)
    for name in ("x", "AB" * 16, "ab" * 15, "ab" * 17, "..evil"):
        (base / name).mkdir()
    (base / ("cd" * 16)).symlink_to(elsewhere)
    (base / ("ef" * 16)).touch()

    assert list(here.root.namespaces()) == [here.namespace]


def test_group_shared_directories_are_for_the_group(tmp_path):
    """Setgid and nothing for others, whatever the umask."""
    root = create(tmp_path / "root", group_shared=True)
    root.namespace(FIELDS, create=True)

    modes = {
        path.stat().st_mode & 0o7777 for path in (tmp_path / "root").rglob("*") if path.is_dir()
    }
    assert modes == {0o2770}


def test_group_shared_documents_are_for_the_group(tmp_path):
    """A pin that the rest of the group could not read would stop everybody's eviction."""
    before = os.umask(0o077)
    try:
        root = create(tmp_path / "root", group_shared=True)
        namespace = root.namespace(FIELDS, create=True)
        Pins(root).write(Pin(name="p", namespace=namespace, keys=(key_of("k"),), created_s=1))
        Writers(root, this=this_process()).register("ab" * 16)
    finally:
        os.umask(before)

    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (tmp_path / "root").rglob("*")
        if path.is_file()
    }
    assert modes == dict.fromkeys(
        ("store.json", "manifest.json", "p.json", f"{'ab' * 16}.json"), 0o660
    )


@pytest.mark.parametrize(("group_shared", "mode"), [(False, 0o644), (True, 0o660)])
def test_documents_are_as_readable_as_the_root(tmp_path, group_shared, mode):
    """Whatever umask a tool is run with, and though nobody told it of the group."""
    before = os.umask(0o022)
    try:
        create(tmp_path / "root", group_shared=group_shared)
        os.umask(0o077)
        root = reopen(tmp_path / "root")
        write_limits(root, LimitsDocument(max_bytes=1))
        Pins(root).write(Pin(name="p", namespace="ab" * 16, keys=(key_of("k"),), created_s=1))
    finally:
        os.umask(before)

    assert root.group_shared is group_shared
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "root").rglob("*.json")}
    assert modes == dict.fromkeys(("store.json", "limits.json", "p.json"), mode)


def test_what_a_tool_makes_is_for_the_group_of_the_root(tmp_path):
    """A namespace of an import would keep the engines of all other users out."""
    create(tmp_path / "root", group_shared=True)
    before = os.umask(0o022)
    try:
        namespace = create(tmp_path / "root").namespace(FIELDS, create=True)
    finally:
        os.umask(before)
    directory = tmp_path / "root" / "ns" / namespace
    assert directory.stat().st_mode & 0o7777 == 0o2770


def test_a_umask_alone_makes_no_root_of_a_group(tmp_path):
    """One user's own root stays as private as it is, though its documents look like a group's."""
    before = os.umask(0o007)
    try:
        create(tmp_path / "root")
        assert not reopen(tmp_path / "root").group_shared
    finally:
        os.umask(before)


def test_a_directory_whose_maker_died_is_mended_at_the_next_opening(tmp_path):
    """Without a mode of its own the rest of the group could write nothing there."""
    calls = FaultyOs(QuickOs())
    create(tmp_path / "root", group_shared=True)
    root = Root.open(str(tmp_path / "root"), os_calls=calls)
    calls.reset(When(fault=Fail(errno.EIO), name="set_mode", nth=1))
    with pytest.raises(UnavailableError):
        root.namespace(FIELDS, create=True)
    namespace = root.namespace(FIELDS, create=True)
    directory = tmp_path / "root" / "ns" / namespace
    assert directory.stat().st_mode & 0o7777 == 0o2770


def test_a_mount_without_permissions_is_asked_for_none(tmp_path):
    """It shows one mode for every file and may refuse to set any."""
    calls = FaultyOs(FlatOs(), When(fault=Fail(errno.EPERM), name="set_mode", forever=True))
    root = Root.create(str(tmp_path / "root"), os_calls=calls)
    write_limits(root, LimitsDocument(max_bytes=1))
    assert calls.count("set_mode") == 0


def test_differences_are_bounded():
    """A message stays readable, whatever was put into a manifest."""
    lines = diff_fields({str(n): "x" * 1000 for n in range(100)}, {}, limit=20)

    assert len(lines) == 20
    assert all(len(line) < 500 for line in lines)


def test_a_root_that_vanishes_is_unavailable(tmp_path):
    """An unmounted root is an error of the environment, from every method."""
    here = Fixture(str(tmp_path / "root"))
    shutil.rmtree(tmp_path / "root")

    with pytest.raises(UnavailableError):
        reopen(tmp_path / "root")
    with pytest.raises(PrefixStoreError):
        here.root.check_writable()
    assert list(here.root.namespaces()) == []
    assert here.root.manifest(NamespaceId("ab" * 16)) is None
