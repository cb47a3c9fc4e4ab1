"""Chunks leave in an archive and arrive as they were; nothing that is wrong arrives at all."""

import io
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixstore.config import StoreConfig
from prefixstore.errors import CorruptError, FullError, InvalidError, PrefixStoreError
from prefixstore.keys import Fields, Key
from prefixstore.ops.archive import ArchiveDocument, ArchiveReader, ArchiveWriter
from prefixstore.ops.export import export, select
from prefixstore.ops.importing import ImportReport, import_archive, import_stream, inspect
from prefixstore.store import Chunk, PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, chain, payload_of, store_chain

TRUNK, LEFT, RIGHT = chain("trunk", 3), chain("left", 3), chain("right", 2)
OTHER_FIELDS = {**FIELDS, "dtype": "float16"}
OTHER = chain("trunk", 4)
"""Begins with the very keys of TRUNK, in another namespace."""
BLOCK = 512

Blobs = dict[str, bytes]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return a root of two namespaces, one with a fork."""
    path = f"{tmp_path}/root"
    with opener(path, create=True)(FIELDS) as store:
        store_chain(store, TRUNK)
        for branch in (LEFT, RIGHT):
            for at, key in enumerate(branch):
                parent = branch[at - 1] if at else TRUNK[-1]
                store.store(Chunk(key=key, parent=parent, end_token=16 * (4 + at)), payload_of(key))
        store.pin("left", LEFT[:2])
    with opener(path)(OTHER_FIELDS) as store:
        for at, key in enumerate(OTHER):
            parent = OTHER[at - 1] if at else None
            payload = payload_of(key, 5000)
            store.store(Chunk(key=key, parent=parent, end_token=16 * (at + 1)), payload)
    return path


def opener(root: str, *, create: bool = True, **settings: int) -> Callable[[Fields], PrefixStore]:
    """Return a function that opens a root for a namespace's fields."""
    # Stores of one root share an index, as the command line's do: a quota is of the root.
    config = StoreConfig.from_mapping(
        {"direct_io": "off", "index_dir": f"{root}-index", **settings}
    )
    return lambda fields: PrefixStore.open(
        root, namespace=fields, config=config, create=create, background=False
    )


def exported(root: str, **choice: object) -> bytes:
    """Return an archive of what is chosen of a root; all of it was well."""
    out = io.BytesIO()
    with PrefixStore.open(root, index=None, create=False) as store:
        store.reconcile()
        report = export(store, select(store, **choice), out)
    assert (report.errors, report.unknown_keys) == ((), ())
    return out.getvalue()


def imported(archive: bytes, root: str, **settings: int) -> ImportReport:
    """Import an archive as a file is: proved first."""

    def opened() -> AbstractContextManager[io.BytesIO]:
        return nullcontext(io.BytesIO(archive))

    return import_archive(opened, opener(root, **settings), name="archive")


def blobs(root: str) -> Blobs:
    """Return every published blob by its path in the root."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in Path(root).glob("ns/*/*/*/*.kv")
    }


def keys_of(found: Blobs) -> set[Key]:
    """Return the keys that blobs are named by."""
    return {Key(bytes.fromhex(Path(path).stem)) for path in found}


def members(archive: bytes) -> list[tuple[str, bytes]]:
    """Read an archive as tar does."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(each.name, tar.extractfile(each).read()) for each in tar]


def packed(contents: list[tuple[str, bytes]], **kinds: bytes) -> bytes:
    """Write a tar of named members; ``kinds`` makes members of another type by their names."""
    out = io.BytesIO()
    for name, content in contents:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.type = kinds.get(name.replace("/", "_").replace(".", "_"), tarfile.REGTYPE)
        out.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK))
    return out.getvalue() + bytes(2 * BLOCK)


# Round trips.


def test_a_round_trip_keeps_every_byte(root: str, tmp_path: Path) -> None:
    """All namespaces, all chunks; each file is the very same."""
    target = f"{tmp_path}/target"
    report = imported(exported(root), target)

    assert blobs(target) == blobs(root)
    assert (report.chunks, report.imported, report.existed) == (12, 12, 0)


def test_what_arrived_can_be_loaded(root: str, tmp_path: Path) -> None:
    """A store that opens the namespace finds the whole prefix and loads it, verified."""
    target = f"{tmp_path}/target"
    imported(exported(root), target)
    with opener(target)(FIELDS) as store:
        out = bytearray(6000)
        found = store.longest_prefix([*TRUNK, *RIGHT])
        store.load(RIGHT[-1], out, raw_bytes=6000)

    assert found == 5
    assert bytes(out) == payload_of(RIGHT[-1])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        pytest.param({"pins": ["left"]}, {*TRUNK, *LEFT[:2]}, id="a pin"),
        pytest.param({"keys": [RIGHT[0]]}, {*TRUNK, RIGHT[0]}, id="a key"),
        pytest.param({"keys": [OTHER[3]]}, {*OTHER}, id="a key of the other namespace"),
    ],
)
def test_what_is_chosen_comes_with_all_before_it(
    root: str, tmp_path: Path, choice: dict[str, object], expected: set[Key]
) -> None:
    """A chunk without its ancestors could not be reached."""
    target = f"{tmp_path}/target"
    imported(exported(root, **choice), target)

    assert keys_of(blobs(target)) == expected


def test_any_tar_lists_it_and_parents_come_first(root: str) -> None:
    """Numbered blobs between what the archive is and where it ends."""
    names = [name for name, _ in members(exported(root))]

    assert names[0] == "prefixstore.json"
    assert names[1:-1] == [f"blobs/{number:012d}.kv" for number in range(12)]
    assert names[-1] == "end.json"


def test_a_second_import_changes_nothing(root: str, tmp_path: Path) -> None:
    """What exists is skipped, file by file."""
    target, archive = f"{tmp_path}/target", exported(root)
    imported(archive, target)
    before = {path: path.stat().st_mtime_ns for path in Path(target).glob("ns/*/*/*/*.kv")}
    report = imported(archive, target)
    after = {path: path.stat().st_mtime_ns for path in Path(target).glob("ns/*/*/*/*.kv")}

    assert (report.imported, report.existed, report.file_bytes) == (0, 12, 0)
    assert after == before


def test_an_import_without_room_stops_and_goes_on_later(root: str, tmp_path: Path) -> None:
    """What was imported stays, and is told; with more room the rest follows."""
    target, archive = f"{tmp_path}/target", exported(root, keys=[LEFT[-1], RIGHT[-1]])
    with pytest.raises(FullError, match=r"5 of 5 chunks so far.*quota"):
        imported(archive, target, max_bytes=5 * FILE_BYTES + 1)
    assert len(blobs(target)) == 5
    report = imported(archive, target)

    assert (report.imported, report.existed) == (3, 5)
    assert keys_of(blobs(target)) == {*TRUNK, *LEFT, *RIGHT}


def test_imported_chunks_can_be_pinned(root: str, tmp_path: Path) -> None:
    """Under one name, and one more for each further namespace."""
    target = f"{tmp_path}/target"
    import_stream(io.BytesIO(exported(root)), opener(target), name="archive", pin="shipped")
    with PrefixStore.open(target, index=None, create=False) as store:
        held = {pin.name: set(pin.keys) for pin in store.pins()}

    assert set(held) == {"shipped", "shipped.1"}
    assert set().union(*held.values()) == {*TRUNK, *LEFT, *RIGHT, *OTHER}


# What an export leaves out.


def test_damage_is_not_spread(root: str) -> None:
    """A damaged chunk and all that follow it are left out and told; the rest is a whole archive."""
    (path,) = Path(root).glob(f"ns/*/*/*/{LEFT[1].hex()}.kv")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    out = io.BytesIO()
    with PrefixStore.open(root, index=None, create=False) as store:
        store.reconcile()
        report = export(store, select(store), out)

    assert report.chunks == 10
    assert ["digest" in report.errors[0], report.errors[1]] == [
        True,
        "1 chunks were left out: they follow what was",
    ]
    inspect(io.BytesIO(out.getvalue()), name="archive")


def test_names_that_are_not_there_are_told(root: str) -> None:
    """A missing pin is an error that lists those that are there, a missing key a warning."""
    with PrefixStore.open(root, index=None, create=False) as store:
        store.reconcile()
        unknown = select(store, keys=[chain("nowhere", 1)[0]]).unknown_keys
        with pytest.raises(InvalidError, match=r"no pin 'right'.*there are: left"):
            select(store, pins=["right"])

    assert unknown == tuple(chain("nowhere", 1))


# Hostile archives.


def refused(archive: bytes, target: Path) -> str:
    """Try to import an archive; return why it was refused. Nothing may be there after."""
    with pytest.raises(PrefixStoreError) as refusal:
        imported(archive, f"{target}/target")
    assert blobs(f"{target}/target") == {}
    assert isinstance(refusal.value, InvalidError | CorruptError)
    return str(refusal.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"x", b"L"])
def test_only_plain_files_are_read(root: str, tmp_path: Path, kind: bytes) -> None:
    """No link, no device, none of tar's extensions."""
    contents = members(exported(root))
    why = refused(packed(contents, blobs_000000000003_kv=kind), tmp_path)

    assert "blobs/000000000003.kv or end.json expected" in why


@pytest.mark.parametrize(
    "name", ["../../evil.kv", "/etc/evil", "blobs/000000000009.kv", "blobs/000000000000.kv", "x"]
)
def test_only_the_next_name_is_read(root: str, tmp_path: Path, name: str) -> None:
    """No path leaves the root: names in an archive name nothing."""
    contents = members(exported(root))
    contents[4] = (name, contents[4][1])
    why = refused(packed(contents), tmp_path)

    assert "blobs/000000000003.kv or end.json expected" in why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "root-index"]


def test_a_namespace_is_proved_by_its_fields(root: str, tmp_path: Path) -> None:
    """An id that the fields do not make is refused: other weights' KV under a known name."""
    contents = members(exported(root))
    document = msgspec.json.decode(contents[0][1], type=ArchiveDocument)
    (one, fields), (two, others) = document.namespaces.items()
    forged = msgspec.structs.replace(document, namespaces={one: others, two: fields})
    contents[0] = ("prefixstore.json", msgspec.json.encode(forged))

    assert "its fields make" in refused(packed(contents), tmp_path)


def test_a_blob_of_a_namespace_that_is_not_told_is_refused(root: str, tmp_path: Path) -> None:
    """A blob's own header says where it belongs; the archive must say what that is."""
    contents = members(exported(root))
    document = msgspec.json.decode(contents[0][1], type=ArchiveDocument)
    kept = dict(list(document.namespaces.items())[:1])
    forged = msgspec.structs.replace(document, namespaces=kept)
    contents[0] = ("prefixstore.json", msgspec.json.encode(forged))

    assert "whose fields it does not tell" in refused(packed(contents), tmp_path)


def test_a_blob_twice_or_before_its_parent_is_refused(root: str, tmp_path: Path) -> None:
    """Chains arrive from their start, each chunk once."""
    contents = members(exported(root))
    numbered = [name for name, _ in contents]
    bodies = [content for _, content in contents]
    turned = [bodies[0], *reversed(bodies[1:-1]), bodies[-1]]
    orphan = packed(list(zip(numbered, turned, strict=True)))
    twice = packed(list(zip(numbered, [*bodies[:2], bodies[1], *bodies[3:]], strict=True)))

    assert "after what follows it" in refused(orphan, tmp_path)
    assert "comes twice" in refused(twice, tmp_path)


def test_lying_sizes_ask_for_no_memory(root: str, tmp_path: Path) -> None:
    """A first member or a blob that says it is huge is refused by its header."""
    archive = bytearray(exported(root))
    for at in (0, archive.index(b"blobs/000000000000.kv")):
        forged = bytearray(archive)
        info = tarfile.TarInfo.frombuf(bytes(archive[at : at + BLOCK]), "ascii", "strict")
        info.size = 2**40
        forged[at : at + BLOCK] = info.tobuf(tarfile.GNU_FORMAT)
        assert "may be" in refused(bytes(forged), tmp_path)


def test_an_archive_of_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    """It says which format it is, and what to do."""
    document = ArchiveDocument(archive=2, store_id="x", namespaces={}, chunks=0, file_bytes=0)
    archive = packed([("prefixstore.json", msgspec.json.encode(document))])

    assert "format 2, this version reads 1: use a newer prefixstore" in refused(archive, tmp_path)


def test_an_empty_archive_is_whole(tmp_path: Path) -> None:
    """Nothing was chosen: nothing arrives."""
    out = io.BytesIO()
    writer = ArchiveWriter(out)
    writer.begin(store_id="x", namespaces={}, chunks=0, size_bytes=0)
    writer.end()
    report = imported(out.getvalue(), f"{tmp_path}/target")

    assert report.chunks == 0


@dataclass(frozen=True, repr=False)
class Good:
    """A small archive, and the image of each blob in it."""

    archive: bytes
    images: dict[Key, bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Return an archive of three chunks."""
    path = f"{tmp_path_factory.mktemp('good')}/root"
    with opener(path)(FIELDS) as store:
        store_chain(store, TRUNK)
    found = blobs(path)
    images = {Key(bytes.fromhex(Path(path).stem)): image for path, image in found.items()}
    return Good(exported(path), images)


@pytest.mark.crash
def test_cut_anywhere_nothing_arrives(good: Good, tmp_path: Path) -> None:
    """A file that ends at any block's edge, or beside it, is refused before anything is visible."""
    archive = good.archive
    ends = {edge + off for edge in range(0, len(archive) - 2 * BLOCK, BLOCK) for off in (0, 1, 511)}
    for end in sorted(each for each in ends if each < len(archive) - 2 * BLOCK):
        with pytest.raises((InvalidError, CorruptError)):
            inspect(io.BytesIO(archive[:end]), name="archive")


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "repeat", "put in"]),
        st.integers(0, 50_000),
        st.integers(1, 255),
        st.sampled_from([1, BLOCK, 4096, 8704]),
    ),
    min_size=1,
    max_size=3,
)


def edit(archive: bytes, edits: list[tuple[str, int, int, int]]) -> bytes:
    """Change an archive: flip bits of a byte, cut a run out, repeat one, put one in."""
    changed = bytearray(archive)
    for kind, place, bits, length in edits:
        at = place % max(1, len(changed))
        match kind:
            case "flip":
                changed[at : at + 1] = bytes([changed[at] ^ bits]) if changed else b""
            case "cut":
                del changed[at : at + length]
            case "repeat":
                changed[at:at] = changed[at : at + length]
            case _:
                changed[at:at] = bytes([bits]) * length
    return bytes(changed)


@settings(max_examples=60, deadline=None)
@given(edits=EDITS)
def test_whatever_is_changed_nothing_wrong_arrives(
    good: Good,
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[str, int, int, int]],
) -> None:
    """Bytes flipped, cut out, repeated or put in: what a stream still publishes is what was exported."""
    changed = edit(good.archive, edits)
    directory = tmp_path_factory.mktemp("fuzz")
    target = f"{directory}/target"
    with suppress(InvalidError, CorruptError):
        import_stream(io.BytesIO(changed), opener(target), name="archive")
    found = {Key(bytes.fromhex(Path(p).stem)): content for p, content in blobs(target).items()}

    assert {key: good.images.get(key) for key in found} == found
    assert {path.name for path in directory.iterdir()} <= {"target", "target-index"}


def test_a_reader_stops_at_the_end(good: Good) -> None:
    """Something behind the last member is no part of an archive."""
    archive = good.archive
    with pytest.raises(InvalidError, match="something follows its end"):
        inspect(io.BytesIO(archive[: -2 * BLOCK] + b"x" * 2 * BLOCK), name="archive")
    reader = ArchiveReader(io.BytesIO(archive), name="archive")
    assert len(list(reader.blobs(memoryview(bytearray(FILE_BYTES))))) == 3
    assert reader.read_bytes == len(archive) - 2 * BLOCK
