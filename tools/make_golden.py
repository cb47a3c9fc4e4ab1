"""Write the golden root of the current format into tests/golden, once.

A golden root is evidence of what an older release wrote, so one that exists is never written again: a
new format gets a new directory beside it. Run from the repository's root:

    python tools/make_golden.py

Beside the root goes a catalogue, ``<format>.json``, that says what a reader must make of each blob. Its
payloads follow a rule that ``tests/tree/test_golden.py`` states anew, so that neither side trusts the
other.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

import msgspec

from prefixstore.blob.header import FORMAT_VERSION, HEADER_BYTES, decode_header, encode_header
from prefixstore.blob.reasons import MissReason
from prefixstore.config import Codec, StoreConfig
from prefixstore.keys import Key, NamespaceId, make_key
from prefixstore.testing.clock import ManualClock
from prefixstore.tree.blobs import BlobTree, ChunkHead
from prefixstore.tree.buffer import Buffer
from prefixstore.tree.pins import Pin, Pins
from prefixstore.tree.root import Root
from prefixstore.tree.writers import WriterDocument, Writers

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
WRITER = "5eed" * 8
CREATED_S = 1_700_000_000
FIELDS = {
    "model": "gölden/tiny",
    "dtype": "bfloat16",
    "layers": 2,
    "groups": [{"kind": "full", "heads": 1, "head_size": 8}],
    "rope": {"base": 10000.5, "scaling": None},
    "lora": False,
}

CHUNKS: tuple[tuple[str, int, int, str | None, Codec, int, int], ...] = (
    # name, bytes of the block hash, KV group, parent, codec, element bytes, payload bytes
    ("first", 32, 0, None, Codec.RAW, 2, 4096),
    ("second", 32, 0, "first", Codec.RAW, 2, 4097),
    ("third", 32, 0, "second", Codec.RAW, 2, 1),
    ("other group", 32, 1, None, Codec.RAW, 2, 10_000),
    ("short key", 8, 0, None, Codec.RAW, 1, 100),
    ("zstd", 32, 0, "third", Codec.ZSTD, 1, 20_000),
    ("planes of two", 32, 0, "zstd", Codec.SHUFFLE_ZSTD, 2, 20_001),
    ("planes of four", 32, 0, "planes of two", Codec.SHUFFLE_ZSTD, 4, 20_003),
    ("cut short", 32, 0, None, Codec.RAW, 2, 9000),
    ("cut to nothing", 32, 0, None, Codec.RAW, 2, 9000),
    ("too long", 32, 0, None, Codec.RAW, 2, 9000),
    ("payload flipped", 32, 0, None, Codec.RAW, 2, 9000),
    ("header flipped", 32, 0, None, Codec.RAW, 2, 9000),
    ("newer version", 32, 0, None, Codec.RAW, 2, 9000),
    ("another key's", 32, 0, None, Codec.RAW, 2, 9000),
)


def key_of(name: str) -> Key:
    """Return a key that is fixed by its name."""
    hash_bytes, group = next((row[1], row[2]) for row in CHUNKS if row[0] == name)
    digest = hashlib.sha256(name.encode()).digest()
    return make_key(digest[:hash_bytes] + group.to_bytes(4, "big"))


def payload_of(name: str, length: int) -> bytes:
    """Return bytes that compress and that no two names share."""
    seed = hashlib.sha256(name.encode()).digest()
    return bytes(seed[i // 2 % 32] if i % 2 else i // 64 & 0xFF for i in range(length))


def main() -> None:
    """Write root and catalogue, unless they are there."""
    name = f"v{FORMAT_VERSION}"
    target, catalogue = GOLDEN / name, GOLDEN / f"{name}.json"
    if target.exists() or catalogue.exists():
        sys.exit(f"{target} exists: golden roots are evidence and are never written again")
    root = Root.create(str(target.resolve()))
    namespace = root.namespace(FIELDS, create=True)
    entries = _write_blobs(root, namespace)
    _write_documents(root, namespace)
    for directory in sorted(target.rglob("*"), reverse=True):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()  # git keeps no empty directory: a reader has to do without.
    document = {
        "store_id": root.store_id,
        "namespace": namespace,
        "fields": FIELDS,
        "writer": WRITER,
        "created_s": CREATED_S,
        "blobs": entries,
    }
    catalogue.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def _write_blobs(root: Root, namespace: NamespaceId) -> list[dict[str, object]]:
    """Store every chunk, then damage those that are named for it; return what readers must find."""
    clock = ManualClock(start_s=CREATED_S)
    tree = BlobTree(root, config=StoreConfig(direct_io="off"), writer=WRITER, clock=clock)
    entries: list[dict[str, object]] = []
    for number, (name, _, _, parent, codec, element_bytes, length) in enumerate(CHUNKS):
        key = key_of(name)
        buffer = Buffer.allocate(length)
        buffer.payload(length)[:] = payload_of(name, length)
        head = ChunkHead(
            key=key,
            parent=key_of(parent) if parent else None,
            end_token=16 * (number + 1),
            element_bytes=element_bytes,
            codec=codec,
        )
        stored = tree.store(namespace, head, buffer, raw_bytes=length).header
        assert stored.codec is codec, f"{name} does not compress"
        path = Path(root.layout.blob(namespace, key))
        entries.append(
            {
                "name": name,
                "path": str(path.relative_to(root.path)),
                "key": key.hex(),
                "parent": head.parent.hex() if head.parent else None,
                "end_token": head.end_token,
                "codec": codec,
                "element_bytes": element_bytes,
                "raw_bytes": length,
                "miss": _damage(
                    name, path, first=Path(root.layout.blob(namespace, key_of("first")))
                ),
            }
        )
    return entries


def _damage(name: str, path: Path, *, first: Path) -> MissReason | None:
    """Do to a blob what its name says; return the reason for which readers must refuse it."""
    content = bytearray(path.read_bytes())
    reason: MissReason | None = None
    match name:
        case "cut short":
            content, reason = content[:8192], MissReason.TORN
        case "cut to nothing":
            content, reason = bytearray(), MissReason.TORN
        case "too long":
            content, reason = content + bytes(4096), MissReason.TORN
        case "payload flipped":
            content[HEADER_BYTES + 4000] ^= 1
            reason = MissReason.DIGEST
        case "header flipped":
            content[32] ^= 1
            reason = MissReason.HEADER
        case "newer version":
            header = dataclasses.replace(decode_header(bytes(content)), version=FORMAT_VERSION + 1)
            content[:HEADER_BYTES] = encode_header(header)
            reason = MissReason.VERSION
        case "another key's":
            content, reason = bytearray(first.read_bytes()), MissReason.KEY
    path.write_bytes(content)
    return reason


def _write_documents(root: Root, namespace: NamespaceId) -> None:
    chain = (key_of("first"), key_of("second"))
    pins = Pins(root)
    pins.write(Pin(name="system-prompt", namespace=namespace, keys=chain, created_s=CREATED_S))
    pins.write(
        Pin(
            name="for_a_day.1",
            namespace=namespace,
            keys=chain[:1],
            created_s=CREATED_S,
            ends_at_s=CREATED_S + 86400,
        )
    )
    somewhere = WriterDocument(
        host="host-a",
        boot_id="00000000-0000-4000-8000-000000000000",
        pid=4242,
        pid_namespace="pid:[4026531836]",
        started="123456",
    )
    Writers(root, this=somewhere).register(WRITER)


if __name__ == "__main__":
    main()
