"""Names of chunks and namespaces: pure values, no I/O.

A **key** is vLLM's ``OffloadKey``: the chained hash of a chunk's last block, followed by the index of
its KV group as four big-endian bytes (vllm/v1/kv_offload/base.py, ``make_offload_key``). The hash
chains over all tokens before it, so equal keys in one namespace mean equal prefixes. The key of the
chunk one nearer to the start, in the same group, is its **parent**.

A **namespace id** names everything else that decides a chunk's bytes: 32 hex digits, the first half
of the SHA-256 of the namespace's fields in canonical JSON. The fields themselves are kept in a
manifest and compared whole at open, so the id is a name and never a proof.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NewType

import msgspec

from prefixstore.errors import InvalidError

__all__ = [
    "KEY_BYTES_MAX",
    "KEY_BYTES_MIN",
    "Fields",
    "Key",
    "NamespaceId",
    "derive_key",
    "key_from_hex",
    "kv_group",
    "make_key",
    "namespace_id",
]

Key = NewType("Key", bytes)
NamespaceId = NewType("NamespaceId", str)
Fields = Mapping[str, object]
"""Fields of a namespace: JSON values only."""

GROUP_BYTES = 4
KEY_BYTES_MIN = 8 + GROUP_BYTES
"""A 64-bit hash is the weakest that vLLM offers; anything shorter is no hash of vLLM's."""
KEY_BYTES_MAX = 64
"""Room for a 480-bit hash; bounds names, headers and index rows."""


def make_key(raw: bytes) -> Key:
    """Check that ``raw`` can be a key and brand it.

    Raises:
        InvalidError: The length is outside ``KEY_BYTES_MIN..KEY_BYTES_MAX``.
    """
    if not KEY_BYTES_MIN <= len(raw) <= KEY_BYTES_MAX:
        raise InvalidError(
            f"a key has {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes (block hash and KV group), "
            f"this one has {len(raw)}: {raw[:80].hex()}"
        )
    return Key(bytes(raw))


def key_from_hex(text: str) -> Key:
    """Read a key from hex digits, as ``prefixstore ls`` prints it.

    >>> key_from_hex("00" * 8 + "00000001").hex()
    '000000000000000000000001'
    """
    try:
        raw = bytes.fromhex(text)
    except ValueError as error:
        raise InvalidError(f"a key is written in hex digits, this is not: {text[:80]!r}") from error
    return make_key(raw)


def kv_group(key: Key) -> int:
    """Return the index of the KV cache group that the chunk belongs to."""
    return int.from_bytes(key[-GROUP_BYTES:], "big")


def derive_key(key: Key, context: bytes) -> Key:
    """Name a chunk whose bytes depend on more than its namespace and ``key`` say: on ``context`` too.

    Of the same length and group; as unlike the keys of any other context as two block hashes are.

    >>> kv_group(derive_key(key_from_hex("00" * 16 + "00000001"), b"an adapter"))
    1
    """
    hash_bytes, group = key[:-GROUP_BYTES], key[-GROUP_BYTES:]
    mixed = hashlib.shake_256(b"prefixstore derived key\0" + context + hash_bytes)
    return Key(mixed.digest(len(hash_bytes)) + group)


def namespace_id(fields: Fields) -> NamespaceId:
    """Name a namespace by its fields; the order of the fields does not matter.

    >>> namespace_id({"theta": 1e6, "eps": 1e-5}) == namespace_id({"eps": 1e-5, "theta": 1e6})
    True
    """
    plain = msgspec.json.decode(msgspec.json.encode(dict(fields)))
    # The standard library's form of numbers is specified (float.__repr__); msgspec's is its own affair,
    # and another form in a later version would hide every blob of the namespace.
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return NamespaceId(hashlib.sha256(canonical.encode()).hexdigest()[:32])
