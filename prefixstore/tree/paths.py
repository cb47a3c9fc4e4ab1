"""Where things lie under a root, and which names count. Pure: keys in, paths out.

    store.json                       the root's identity
    ns/<id>/manifest.json            a namespace's fields, in full
    ns/<id>/<aa>/<bb>/<key>.kv       a blob; aa and bb are the first two bytes of its key
    ns/<id>/<aa>/<bb>/.<writer>.<n>.tmp    a blob that is not published yet
    writers/<writer>.json            who the writer is
    writers/<id>.probe               a try whether the root can be written
    limits.json                      what all hosts keep to
    pins/<name>.json                 a named set of keys that eviction keeps
    prefill/<claimant>.json          a process that computes prompts ahead of need
    prefill/<id>/<key>.<n>.json      which of them computes from this chunk on
    quarantine/<reason>.<id>.<key>.kv    corrupt blobs, kept for inspection
    collector/, history/             small files of the writers about themselves
    scrub/                           how far the root was scrubbed, and by whom

Two levels of 256 directories: a flat directory fails on ext4 in the millions, while 65,536 leaves keep a
hundred million blobs at some 1,500 names each. A blob lies in one directory all its life, so its inode and
data are where its directory is. Every scan ignores names outside this grammar, so nothing that strays into
a root is ever read, counted or removed.
"""

import re

from prefixstore.errors import InvalidError
from prefixstore.keys import KEY_BYTES_MAX, KEY_BYTES_MIN, Key, NamespaceId

__all__ = [
    "BLOB_SUFFIX",
    "Layout",
    "blob_key",
    "is_fan",
    "is_namespace",
    "is_pin_name",
    "is_probe",
    "is_writer",
    "temporary_writer",
]

BLOB_SUFFIX = ".kv"
_FAN = re.compile(r"[0-9a-f]{2}")
_ID = re.compile(r"[0-9a-f]{32}")
_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PROBE = re.compile(r"[0-9a-f]{32}\.probe")
_TEMPORARY = re.compile(r"\.([0-9a-f]{32})\.[0-9a-f]{1,16}\.tmp")
_BLOB = re.compile(rf"((?:[0-9a-f]{{2}}){{{KEY_BYTES_MIN},{KEY_BYTES_MAX}}})\.kv")


def blob_key(name: str) -> Key | None:
    """Return the key that a blob's file name stands for, None for any other name.

    >>> blob_key("00" * 8 + "00000001.kv").hex()
    '000000000000000000000001'
    >>> blob_key("../evil.kv")
    """
    found = _BLOB.fullmatch(name)
    return Key(bytes.fromhex(found[1])) if found else None


def is_fan(name: str) -> bool:
    """Whether a directory's name is one byte in hex."""
    return _FAN.fullmatch(name) is not None


def is_namespace(name: str) -> bool:
    """Whether a directory's name is a namespace id."""
    return _ID.fullmatch(name) is not None


def is_writer(name: str) -> bool:
    """Whether a name is a writer's id."""
    return _ID.fullmatch(name) is not None


def is_probe(name: str) -> bool:
    """Whether a file's name is that of a try whether the root can be written."""
    return _PROBE.fullmatch(name) is not None


def temporary_writer(name: str) -> str | None:
    """Return the id of the writer whose unpublished blob has this name, None for any other name.

    >>> temporary_writer("." + "ab" * 16 + ".1f.tmp")
    'abababababababababababababababab'
    """
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def is_pin_name(name: str) -> bool:
    """Whether a pin may have this name: a safe file name of letters, digits, dot, dash, underscore."""
    return _PIN.fullmatch(name) is not None


class Layout:
    """The paths of one root. Immutable."""

    __slots__ = (
        "collector",
        "history",
        "limits",
        "namespaces",
        "pins",
        "prefill",
        "quarantine",
        "root",
        "scrub",
        "store",
        "writers",
    )

    def __init__(self, root: str) -> None:
        self.root = root
        self.store = f"{root}/store.json"
        self.limits = f"{root}/limits.json"
        self.namespaces = f"{root}/ns"
        self.writers = f"{root}/writers"
        self.pins = f"{root}/pins"
        self.prefill = f"{root}/prefill"
        self.quarantine = f"{root}/quarantine"
        self.collector = f"{root}/collector"
        self.history = f"{root}/history"
        self.scrub = f"{root}/scrub"

    def namespace(self, namespace: NamespaceId) -> str:
        """Return a namespace's directory."""
        return f"{self.namespaces}/{namespace}"

    def manifest(self, namespace: NamespaceId) -> str:
        """Return a namespace's manifest."""
        return f"{self.namespaces}/{namespace}/manifest.json"

    def blob(self, namespace: NamespaceId, key: Key) -> str:
        """Return a blob's path.

        >>> Layout("/kv").blob(NamespaceId("ab" * 16), Key(bytes(range(12))))[36:]
        'ab/00/01/000102030405060708090a0b.kv'
        """
        digits = key.hex()
        return f"{self.namespaces}/{namespace}/{digits[:2]}/{digits[2:4]}/{digits}{BLOB_SUFFIX}"

    def temporary(self, namespace: NamespaceId, key: Key, *, writer: str, number: int) -> str:
        """Return the path of a blob until it is published.

        Args:
            namespace: Where it belongs.
            key: Its key.
            writer: Who writes it.
            number: Which of the writer's files it is; none has the same.
        """
        outer, inner = key[:1].hex(), key[1:2].hex()
        return f"{self.namespaces}/{namespace}/{outer}/{inner}/.{writer}.{number:x}.tmp"

    def writer(self, writer: str) -> str:
        """Return the file that says who a writer is."""
        return f"{self.writers}/{writer}.json"

    def probe(self, name: str) -> str:
        """Return the file of a try whether the root can be written; ``name`` has 32 hex digits."""
        return f"{self.writers}/{name}.probe"

    def pin(self, name: str) -> str:
        """Return a pin's file.

        Raises:
            InvalidError: The name is not one that a pin may have.
        """
        if not is_pin_name(name):
            raise InvalidError(
                f"a pin's name has 1 to 128 letters, digits, dots, dashes and underscores and "
                f"begins with a letter or digit, this one does not: {name[:200]!r}"
            )
        return f"{self.pins}/{name}.json"
