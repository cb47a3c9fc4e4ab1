"""The golden root: what format 1 looked like when it was released, read by two readers.

The first reader is written from docs/format.md alone, with nothing of prefixstore in it. If it fails, the
page is wrong or the format has changed; never mend it by writing the golden root anew.
"""

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import xxhash
import zstandard

from prefixstore.config import StoreConfig
from prefixstore.keys import key_from_hex
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.blobs import BlobTree, ChunkHead, Miss
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.pins import Pins
from prefixstore.tree.root import Root
from prefixstore.tree.writers import Writers, this_process

GOLDEN = Path(__file__).parent.parent / "golden"
ROOT = GOLDEN / "v1"
CATALOGUE = json.loads((GOLDEN / "v1.json").read_bytes())
BLOBS = {entry["name"]: entry for entry in CATALOGUE["blobs"]}
CODECS = ("raw", "zstd", "shuffle+zstd")


def expected_payload(name: str, length: int) -> bytes:
    """The rule that the golden payloads follow."""
    seed = hashlib.sha256(name.encode()).digest()
    return bytes(seed[i // 2 % 32] if i % 2 else i // 64 & 0xFF for i in range(length))


class RefusedError(Exception):
    """The independent reader's miss."""


def need(condition: object, reason: str) -> None:
    if not condition:
        raise RefusedError(reason)


def independent_read(path: Path, *, raw_bytes: int) -> dict[str, object]:
    """Read one blob as docs/format.md says, section 4."""
    content = path.read_bytes()
    need(len(content) >= 4096, "torn")
    page = content[:4096]
    need(xxhash.xxh3_128(page[:4080]).digest() == page[4080:], "header")
    need(page[:8] == b"PFXSTORE", "header")
    need(struct.unpack_from("<H", page, 8)[0] == 1, "version")
    codec, element, key_length, parent_length = page[10:14]
    raw, stored, end_token, created = struct.unpack_from("<4Q", page, 16)
    key, parent = page[96 : 96 + key_length], page[160 : 160 + parent_length]
    need(codec <= 2 and 1 <= element <= 16, "header")
    need(12 <= key_length <= 64 and (parent_length == 0 or 12 <= parent_length <= 64), "header")
    need(1 <= stored <= raw <= 2**30 and (codec != 0 or stored == raw), "header")
    zeros = page[14:16] + page[96 + key_length : 160] + page[160 + parent_length : 4080]
    need(not any(zeros), "header")
    need(page[48:64].hex() == path.parent.parent.parent.name, "namespace")
    need(f"{key.hex()}.kv" == path.name, "key")
    assert (path.parent.parent.name, path.parent.name) == (f"{key[0]:02x}", f"{key[1]:02x}")
    need(raw == raw_bytes, "size")
    need(len(content) == 4096 + (stored + 4095) // 4096 * 4096, "torn")
    body = content[4096 : 4096 + stored]
    need(xxhash.xxh3_128(body).digest() == page[80:96], "digest")
    if codec:
        body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    if codec == 2:
        count = raw // element
        body = (
            b"".join(
                bytes(body[plane * count + i] for plane in range(element)) for i in range(count)
            )
            + body[count * element :]
        )
    need(len(body) == raw, "codec")
    return {
        "key": key.hex(),
        "parent": parent.hex() or None,
        "end_token": end_token,
        "codec": CODECS[codec],
        "element_bytes": element,
        "raw_bytes": raw,
        "payload": body,
        "writer": page[64:80].hex(),
        "created_s": created,
    }


def expected_fields(name: str) -> dict[str, object]:
    entry = BLOBS[name]
    payload = expected_payload(name, entry["raw_bytes"])
    shared = {"writer": CATALOGUE["writer"], "created_s": CATALOGUE["created_s"]}
    kept = ("key", "parent", "end_token", "codec", "element_bytes", "raw_bytes")
    return {field: entry[field] for field in kept} | shared | {"payload": payload}


@pytest.mark.parametrize("name", BLOBS)
def test_a_reader_written_from_the_page_reads_the_golden_blobs(name):
    """docs/format.md is enough to read every blob, and to refuse every damaged one for the same reason."""
    entry = BLOBS[name]

    def read() -> dict[str, object]:
        return independent_read(ROOT / entry["path"], raw_bytes=entry["raw_bytes"])

    if entry["miss"]:
        with pytest.raises(RefusedError, match=f"^{entry['miss']}$"):
            read()
    else:
        assert expected_fields(name) == read()


@pytest.mark.parametrize("name", BLOBS)
def test_this_version_reads_the_golden_blobs(name):
    """Today's reader finds in the golden root what its catalogue says."""
    entry = BLOBS[name]
    tree = BlobTree(Root.open(str(ROOT)), config=StoreConfig(read_only=True))
    buffer = Buffer.allocate(entry["raw_bytes"])

    found = tree.load(
        CATALOGUE["namespace"], key_from_hex(entry["key"]), buffer, raw_bytes=entry["raw_bytes"]
    )

    if isinstance(found, Miss):
        assert entry["miss"] == found.reason
    else:
        expected = expected_fields(name)
        assert expected == {
            "key": found.key.hex(),
            "parent": found.parent.hex() if found.parent else None,
            "end_token": found.end_token,
            "codec": found.codec,
            "element_bytes": found.element_bytes,
            "raw_bytes": found.raw_bytes,
            "payload": bytes(buffer.payload(entry["raw_bytes"])),
            "writer": found.writer,
            "created_s": found.created_s,
        }


@pytest.mark.parametrize(
    "name", [name for name, entry in BLOBS.items() if entry["codec"] == "raw" and not entry["miss"]]
)
def test_this_version_writes_raw_blobs_as_the_golden_ones(tmp_path, name):
    """The same chunk, writer and time give the same file, byte for byte."""
    entry = BLOBS[name]
    root = Root.create(str(tmp_path / "root"))
    namespace = root.namespace(CATALOGUE["fields"], create=True)
    tree = BlobTree(
        root,
        config=StoreConfig(direct_io="off"),
        writer=CATALOGUE["writer"],
        clock=ManualClock(start_s=CATALOGUE["created_s"]),
    )
    buffer = Buffer.allocate(entry["raw_bytes"])
    buffer.image[:] = b"\xee" * len(buffer.image)
    buffer.payload(entry["raw_bytes"])[:] = expected_payload(name, entry["raw_bytes"])
    head = ChunkHead(
        key=key_from_hex(entry["key"]),
        parent=key_from_hex(entry["parent"]) if entry["parent"] else None,
        end_token=entry["end_token"],
        element_bytes=entry["element_bytes"],
    )

    tree.store(namespace, head, buffer, raw_bytes=entry["raw_bytes"])

    assert (ROOT / entry["path"]).read_bytes() == (tmp_path / "root" / entry["path"]).read_bytes()


def test_the_golden_documents_say_what_the_page_says():
    """Identity, manifest, pins and writers, read with a JSON parser and nothing else."""
    identity = json.loads((ROOT / "store.json").read_bytes())
    manifest = json.loads((ROOT / "ns" / CATALOGUE["namespace"] / "manifest.json").read_bytes())
    canonical = json.dumps(
        CATALOGUE["fields"], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    pin = json.loads((ROOT / "pins" / "for_a_day.1.json").read_bytes())
    writer = json.loads((ROOT / "writers" / f"{CATALOGUE['writer']}.json").read_bytes())

    assert {
        "prefixstore_root": CATALOGUE["store_id"],
        "format": 1,
        "fan_out": [256, 256],
    } == identity
    assert {"fields": CATALOGUE["fields"]} == manifest
    assert CATALOGUE["namespace"] == hashlib.sha256(canonical.encode()).hexdigest()[:32]
    assert {
        "namespace": CATALOGUE["namespace"],
        "keys": [BLOBS["first"]["key"]],
        "created_s": CATALOGUE["created_s"],
        "ends_at_s": CATALOGUE["created_s"] + 86400,
    } == pin
    assert {"host", "boot_id", "pid", "pid_namespace", "started"} == set(writer)


def test_this_version_reads_the_golden_documents():
    """The root opens, its namespace is the one its fields name, and its pins and writers are known."""
    root = Root.open(str(ROOT))
    pins = {pin.name: pin for pin in Pins(root)}

    assert CATALOGUE["store_id"] == root.store_id
    assert [CATALOGUE["namespace"]] == list(root.namespaces())
    assert CATALOGUE["namespace"] == root.namespace(CATALOGUE["fields"], create=False)
    assert ["for_a_day.1", "system-prompt"] == sorted(pins)
    assert [BLOBS["first"]["key"], BLOBS["second"]["key"]] == [
        key.hex() for key in pins["system-prompt"].keys
    ]
    assert pins["system-prompt"].ends_at_s is None
    assert [CATALOGUE["writer"]] == list(Writers(root, this=this_process()).known())


def test_the_page_and_the_header_module_have_the_same_table():
    """docs/format.md and the docstring of the header's module place every field alike."""
    import prefixstore.blob.header as module

    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    in_page = re.findall(r"^\| (\d+) \| (\d+) \|", page, flags=re.MULTILINE)
    in_module = re.findall(r"^ +(\d+) +(\d+)  \w", module.__doc__ or "", flags=re.MULTILINE)

    assert in_page == in_module
    assert [int(offset) + int(size) for offset, size in in_page] == [
        *(int(offset) for offset, _ in in_page[1:]),
        4096,
    ]
