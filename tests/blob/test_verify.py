"""Each check between bytes read and bytes served names the one thing that is wrong."""

import pytest
import xxhash

from prefixstore.blob.header import file_bytes
from prefixstore.blob.reasons import MissReason
from prefixstore.blob.verify import check_header, check_payload
from prefixstore.keys import Key, NamespaceId
from tests.blob.samples import KEY, NAMESPACE, PARENT, a_header


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, None),
        ({"raw_bytes": None, "file_bytes": None}, None),
        ({"namespace": NamespaceId("f0" * 16)}, MissReason.NAMESPACE),
        ({"key": PARENT}, MissReason.KEY),
        ({"key": Key(KEY + b"\0")}, MissReason.KEY),
        ({"key": Key(KEY[:-1])}, MissReason.KEY),
        ({"raw_bytes": 4999}, MissReason.SIZE),
        ({"file_bytes": file_bytes(5000) - 1}, MissReason.TORN),
        ({"file_bytes": file_bytes(5000) + 4096}, MissReason.TORN),
    ],
)
def test_a_header_must_be_what_was_asked_for(asked, reason):
    """Namespace, key and lengths are compared whole."""
    wanted = {
        "namespace": NAMESPACE,
        "key": KEY,
        "raw_bytes": 5000,
        "file_bytes": file_bytes(5000),
    }

    assert reason == check_header(a_header(), **(wanted | asked))


def test_a_payload_must_be_the_one_that_was_stored():
    """Every byte counts, and so does their number."""
    payload = bytearray(range(256)) * 20
    header = a_header(
        raw_bytes=5120, stored_bytes=5120, payload_digest=xxhash.xxh3_128_digest(payload)
    )

    assert check_payload(header, memoryview(payload)) is None
    assert check_payload(header, memoryview(payload)[:-1]) == MissReason.TORN
    for at in (0, 2560, 5119):
        flipped = bytearray(payload)
        flipped[at] ^= 1
        assert check_payload(header, memoryview(flipped)) == MissReason.DIGEST


def test_reasons_are_fit_for_metric_labels():
    """They are one lower-case word each, and stay the same."""
    assert {
        "absent",
        "torn",
        "header",
        "version",
        "namespace",
        "key",
        "size",
        "digest",
        "codec",
        "io",
        "timeout",
    } == {str(reason) for reason in MissReason}
