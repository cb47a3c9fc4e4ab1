"""A blob comes back as it was stored, or not at all."""

import os
import random
from pathlib import Path

import pytest
import xxhash

from prefixstore.blob.header import HEADER_BYTES, decode_header, encode_header, file_bytes
from prefixstore.config import Codec
from prefixstore.errors import InvalidError
from prefixstore.keys import make_key
from prefixstore.testing.faults import FaultyOs
from prefixstore.testing.quick import QuickOs
from prefixstore.tree.blobs import ChunkHead, Miss
from prefixstore.tree.buffer import Buffer
from tests.tree.trees import RAW_BYTES, Fixture, key_of, payload_of

KEY = key_of("one")


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("direct_io", ["auto", "off"])
@pytest.mark.parametrize("raw_bytes", [1, 4095, 4096, 4097, 300_001])
def test_a_payload_survives_storing(tmp_path, codec, direct_io, raw_bytes):
    """Every codec, past the page cache or through it, whole pages or not."""
    here = Fixture(str(tmp_path / "root"), options={"direct_io": direct_io})

    stored = here.store(KEY, codec=codec, raw_bytes=raw_bytes)

    assert not stored.existed
    assert here.file_of(KEY).stat().st_size == stored.file_bytes
    assert here.load(KEY, raw_bytes=raw_bytes) == payload_of(KEY, raw_bytes)


@pytest.mark.parametrize("durability", ["none", "data", "full"])
@pytest.mark.parametrize("group_shared", [False, True])
def test_every_policy_stores(tmp_path, durability, group_shared):
    """The same bytes, however durable and for whomever."""
    options = {"durability": durability, "group_shared": group_shared}
    here = Fixture(str(tmp_path / "root"), options=options)

    here.store(KEY)

    assert here.load(KEY) == payload_of(KEY)
    if group_shared:
        assert here.file_of(KEY).stat().st_mode & 0o777 == 0o660
        assert here.file_of(KEY).parent.stat().st_mode & 0o7777 == 0o2770


def test_nothing_is_synced_unless_asked_for(tmp_path):
    """Durability is the caller's choice, and costs nothing where it is none."""
    calls = {}
    for durability in ("none", "data", "full"):
        counting = FaultyOs(QuickOs())
        here = Fixture(str(tmp_path / durability), counting, {"durability": durability})
        counting.calls.clear()
        here.store(KEY)
        calls[durability] = [c.name for c in counting.calls if c.name in ("sync", "sync_data")]

    # In full, the three directories that the blob's name hangs from.
    assert calls == {"none": [], "data": ["sync_data"], "full": ["sync_data", *["sync"] * 3]}


def test_a_raw_blob_is_one_write_and_one_read(tmp_path):
    """The image in the buffer is the file; nothing is read twice to learn its length."""
    counting = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), counting)
    before = counting.count("write_from"), counting.count("read_into")

    here.store(KEY)
    here.load(KEY)

    assert (counting.count("write_from"), counting.count("read_into")) == (
        before[0] + 1,
        before[1] + 1,
    )


@pytest.mark.parametrize("direct_io", ["auto", "off"])
@pytest.mark.parametrize("length", [0, 100, 5000, 8192])
def test_a_torn_blob_costs_few_reads(tmp_path, direct_io, length):
    """Where a file ends is seen at the second look."""
    counting = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), counting, {"direct_io": direct_io})
    here.store(KEY)
    os.truncate(here.file_of(KEY), length)
    before = counting.count("read_into")

    assert here.load(KEY) == "torn"

    assert counting.count("read_into") - before <= 2


def test_a_key_that_exists_is_left_alone(here):
    """The first writer wins; the second learns what is there."""
    first = here.store(KEY)
    inode = here.file_of(KEY).stat().st_ino

    second = Fixture(here.path).store(KEY, codec=Codec.ZSTD)

    assert (second.existed, second.header) == (True, first.header)
    assert here.file_of(KEY).stat().st_ino == inode
    assert here.temporaries() == []


def test_a_payload_that_does_not_shrink_is_stored_raw(here):
    """Compressing saves whole pages, or it is not worth decoding."""
    noise = random.Random(1).randbytes(RAW_BYTES)
    buffer = Buffer.allocate(RAW_BYTES)
    buffer.payload(RAW_BYTES)[:] = noise
    head = ChunkHead(key=KEY, parent=None, end_token=16, codec=Codec.SHUFFLE_ZSTD)

    stored = here.tree.store(here.namespace, head, buffer, raw_bytes=RAW_BYTES)

    assert stored.header.codec is Codec.RAW
    assert here.load(KEY) == noise


def test_padding_never_holds_what_the_buffer_held(here):
    """Behind the payload there are zeros, not another prompt's KV."""
    buffer = Buffer.allocate(RAW_BYTES)
    buffer.image[:] = b"\xaa" * len(buffer.image)
    head = ChunkHead(key=KEY, parent=None, end_token=16)

    here.tree.store(here.namespace, head, buffer, raw_bytes=5000)

    content = here.file_of(KEY).read_bytes()
    assert content[HEADER_BYTES + 5000 :].strip(b"\0") == b""
    assert len(content) == file_bytes(5000)


def test_the_header_says_who_follows_whom(here):
    """Parent, end token and group are in the blob, so that an index can be built from blobs alone."""
    buffer = Buffer.allocate(RAW_BYTES)
    head = ChunkHead(key=KEY, parent=key_of("parent"), end_token=4096, element_bytes=1)

    here.tree.store(here.namespace, head, buffer, raw_bytes=RAW_BYTES)

    header = here.tree.read_header(here.namespace, KEY)
    assert not isinstance(header, Miss)
    assert (header.key, header.parent, header.end_token, header.element_bytes) == (
        KEY,
        key_of("parent"),
        4096,
        1,
    )


def test_a_read_only_tree_stores_nothing(here):
    """It says so, instead of dropping what it was given."""
    reader = Fixture(here.path, options={"read_only": True})

    with pytest.raises(InvalidError, match="read-only"):
        reader.store(KEY)


@pytest.mark.parametrize("direct_io", ["auto", "on", "off"])
def test_opening_leaves_no_trace(tmp_path, direct_io):
    """The probe for O_DIRECT cleans up after itself."""
    here = Fixture(str(tmp_path / "root"), options={"direct_io": direct_io})

    files = {path.name for path in Path(here.root.path).rglob("*") if path.is_file()}
    assert files == {"store.json", "manifest.json"}


def rewrite(here: Fixture, **changes: object) -> None:
    """Change fields of a blob's header under a fitting checksum."""
    path = here.file_of(KEY)
    content = path.read_bytes()
    header = decode_header(content)
    fields = {name: getattr(header, name) for name in header.__slots__} | changes
    path.write_bytes(encode_header(type(header)(**fields)) + content[HEADER_BYTES:])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda here, path: path.unlink(), "absent"),
        (lambda here, path: path.write_bytes(b""), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes()[:100]), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes()[:4096]), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes()[:-4096]), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes()[:-1]), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes() + b"\0"), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes() + bytes(4096)), "torn"),
        (lambda here, path: path.write_bytes(path.read_bytes() + bytes(2**20)), "torn"),
        (lambda here, path: path.write_bytes(bytes(len(path.read_bytes()))), "header"),
        (lambda here, path: rewrite(here, version=2), "version"),
        (lambda here, path: rewrite(here, namespace="f" * 32), "namespace"),
        (lambda here, path: rewrite(here, key=key_of("other")), "key"),
        (lambda here, path: rewrite(here, raw_bytes=4, stored_bytes=4), "size"),
        (lambda here, path: rewrite(here, payload_digest=bytes(16)), "digest"),
        (lambda here, path: rewrite(here, codec=Codec.ZSTD), "codec"),
        (lambda here, path: (path.unlink(), path.mkdir()), "io"),
        (lambda here, path: (path.unlink(), path.symlink_to("/etc/passwd")), "io"),
        (lambda here, path: (path.unlink(), os.mkfifo(path)), "io"),
        (lambda here, path: (path.unlink(), path.parent.rmdir()), "absent"),
        (lambda here, path: (path.unlink(), path.parent.rmdir(), path.parent.touch()), "absent"),
    ],
)
def test_every_kind_of_damage_is_a_miss_with_its_name(here, damage, reason):
    """No damage raises, hangs or brings bytes."""
    here.store(KEY)

    damage(here, here.file_of(KEY))

    assert here.load(KEY) == reason


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_torn_blob_is_replaced_by_the_next_store(tmp_path, direct_io):
    """What a power cut left is no obstacle."""
    here = Fixture(str(tmp_path / "root"), options={"direct_io": direct_io})
    here.store(KEY)
    for length in (0, 100, 4096, 8192, here.file_of(KEY).stat().st_size - 1):
        os.truncate(here.file_of(KEY), length)
        assert here.load(KEY) == "torn"

        assert not here.store(KEY).existed

        assert here.load(KEY) == payload_of(KEY)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/etc/passwd"), os.mkfifo])
def test_what_is_no_file_is_replaced_and_not_followed(here, make):
    """A link in a blob's place is exchanged for the blob; where it leads stays as it is."""
    here.store(KEY)
    here.file_of(KEY).unlink()
    make(here.file_of(KEY))

    here.store(KEY)

    assert here.load(KEY) == payload_of(KEY)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("seed", range(2))
def test_a_mutated_file_gives_the_stored_bytes_or_none(quick_path, codec, seed):
    """Flip, zero, cut, lengthen, swap pages: never other bytes, never an exception."""
    here = Fixture(str(quick_path / "root"))
    source = random.Random(seed)
    here.store(KEY, codec=codec)
    path, wanted = here.file_of(KEY), payload_of(KEY)
    original = path.read_bytes()
    served = 0
    for number in range(1000):
        mutant = bytearray(original)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(mutant) or 1)
            match source.randrange(6):
                case 0 | 1:
                    mutant[at : at + 1] = bytes(
                        b ^ 1 << source.randrange(8) for b in mutant[at : at + 1]
                    )
                case 2:
                    mutant[at : at + 512] = bytes(len(mutant[at : at + 512]))
                case 3:
                    del mutant[at:]
                case 4:
                    mutant += bytes(source.choice((1, 512, 4096)))
                case 5:
                    page = at // 4096 * 4096
                    mutant[page : page + 4096] = mutant[:4096][: len(mutant[page : page + 4096])]
        path.write_bytes(mutant)
        found = here.load(KEY)
        served += found == wanted
        assert isinstance(found, str) or found == wanted, f"{seed=} {number=}"
    # Only what changes no byte that counts, padding for one, is served.
    assert served < 500


def test_a_blob_under_another_name_is_not_served(here):
    """A hard link, a copy or a server's mix-up: the header knows better."""
    here.store(KEY)
    other = here.file_of(key_of("other"))
    other.parent.mkdir(parents=True)
    os.link(here.file_of(KEY), other)

    assert here.load(key_of("other")) == "key"


def test_a_larger_chunk_than_expected_never_overruns_the_buffer(here):
    """The engine says how long its chunks are; a longer blob is another geometry's."""
    here.store(KEY, raw_bytes=300_000)
    buffer = Buffer.allocate(RAW_BYTES + 8192)
    buffer.image[:] = b"\xee" * len(buffer.image)

    found = here.tree.load(here.namespace, KEY, buffer, raw_bytes=RAW_BYTES)

    assert isinstance(found, Miss)
    assert found.reason == "size"
    assert buffer.image[-4096:] == b"\xee" * 4096


def test_probing_is_one_stat(tmp_path):
    """Lookups ask for thousands of keys."""
    counting = FaultyOs(QuickOs())
    here = Fixture(str(tmp_path / "root"), counting)
    stored = here.store(KEY)
    counting.calls.clear()

    assert here.tree.probe(here.namespace, KEY) == stored.file_bytes
    assert here.tree.probe(here.namespace, key_of("other")) is None
    assert [call.name for call in counting.calls] == ["stat", "stat"]


@pytest.mark.parametrize("length", [0, 100, 4096, 8191])
def test_probing_sees_what_is_surely_torn(here, length):
    """An empty file is no promise."""
    here.store(KEY)
    os.truncate(here.file_of(KEY), length)

    assert here.tree.probe(here.namespace, KEY) is None


def test_touching_uses_the_servers_clock_and_follows_no_link(here, tmp_path):
    """Recency on disk is the mtime; a link planted in the tree touches nothing elsewhere."""
    here.store(KEY)
    os.utime(here.file_of(KEY), (1, 1))

    assert here.tree.touch(here.namespace, KEY)
    assert here.file_of(KEY).stat().st_mtime > 1_000_000_000
    assert not here.tree.touch(here.namespace, key_of("other"))

    victim = tmp_path / "victim"
    victim.touch()
    os.utime(victim, (1, 1))
    here.file_of(KEY).unlink()
    here.file_of(KEY).symlink_to(victim)
    here.tree.touch(here.namespace, KEY)
    assert victim.stat().st_mtime == 1


def test_unlinking_says_whether_it_was_there(here):
    """Two collectors that remove one blob do no harm."""
    here.store(KEY)

    assert here.tree.unlink(here.namespace, KEY)
    assert not here.tree.unlink(here.namespace, KEY)
    assert here.load(KEY) == "absent"


def test_a_scan_finds_each_blob_once_and_resumes(here):
    """Directory by directory, in order, from where an earlier scan ended."""
    keys = {key_of(str(number)) for number in range(60)}
    sizes = {key: here.store(key).file_bytes for key in keys}

    leaves = list(here.tree.scan(here.namespace))
    entries = [entry for _, found in leaves for entry in found]
    middle = leaves[len(leaves) // 2][0]
    rest = list(here.tree.scan(here.namespace, after=middle))

    assert {entry.key: entry.file_bytes for entry in entries} == sizes
    assert len(entries) == len(keys)
    assert [leaf for leaf, _ in leaves] == sorted(leaf for leaf, _ in leaves)
    assert rest == leaves[len(leaves) // 2 + 1 :]


def test_keys_of_every_length_have_their_place(here):
    """From a 64-bit hash to the longest that fits a name."""
    for length in (12, 20, 36, 64):
        key = make_key(bytes(range(length)))
        here.store(key)

        assert here.load(key) == payload_of(key)
    assert sum(len(found) for _, found in here.tree.scan(here.namespace)) == 4


def test_the_digest_covers_the_stored_bytes(here):
    """It is checked before anything is decoded."""
    header = here.store(KEY, codec=Codec.SHUFFLE_ZSTD).header

    content = here.file_of(KEY).read_bytes()
    stored = content[HEADER_BYTES : HEADER_BYTES + header.stored_bytes]
    assert header.payload_digest == xxhash.xxh3_128_digest(stored)
