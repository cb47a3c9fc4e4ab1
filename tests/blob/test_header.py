"""Headers say exactly what was put into them, or are refused."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixstore.blob.header import (
    ALIGN_BYTES,
    HEADER_BYTES,
    decode_header,
    encode_header,
    encode_header_into,
    file_bytes,
)
from prefixstore.blob.reasons import MissReason
from prefixstore.config import RAW_BYTES_MAX, Codec
from prefixstore.errors import CorruptError
from tests.blob.samples import a_header, headers, sealed


def decoded_or_none(page: bytes):
    """Decode a page; None where it is refused as corrupt, and nothing else may be raised."""
    try:
        return decode_header(page)
    except CorruptError:
        return None


def refusal(page: bytes) -> str:
    with pytest.raises(CorruptError) as caught:
        decode_header(page)
    return caught.value.reason


def with_bytes(offset: int, content: bytes) -> bytes:
    """Return a plain header with some bytes replaced and the checksum made to fit."""
    page = bytearray(encode_header(a_header()))
    page[offset : offset + len(content)] = content
    return sealed(page)


@given(headers())
def test_a_header_survives_the_round_trip(header):
    """Decoding gives back every field."""
    assert header == decode_header(encode_header(header))


@given(headers(), st.integers(1, 255))
def test_encoding_into_a_used_page_overwrites_all_of_it(header, old):
    """What a buffer held before never reaches the disk."""
    page = bytearray([old]) * HEADER_BYTES

    encode_header_into(header, memoryview(page))

    assert encode_header(header) == bytes(page)


@given(headers(), st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(header, offset, flip):
    """Any one byte that differs makes the header corrupt."""
    page = bytearray(encode_header(header))
    page[offset] ^= flip

    assert decoded_or_none(bytes(page)) is None


def mutated(source: random.Random, original: bytes) -> bytes:
    """Flip bits, zero, move or cut, one to four times."""
    page = bytearray(original)
    for _ in range(source.randint(1, 4)):
        at, length = source.randrange(HEADER_BYTES), source.randint(1, 64)
        match source.randrange(4):
            case 0:
                page[at : at + 1] = bytes(
                    byte ^ 1 << source.randrange(8) for byte in page[at : at + 1]
                )
            case 1:
                page[at : at + length] = bytes(len(page[at : at + length]))
            case 2:
                page[at : at + length] = page[: len(page[at : at + length])]
            case 3 if source.random() < 0.1:
                del page[at:]
    return bytes(page)


@pytest.mark.parametrize("seed", range(4))
def test_mutants_are_refused(seed):
    """Flipped, zeroed, moved and cut pages raise CorruptError and nothing else."""
    source = random.Random(seed)
    original = encode_header(a_header())
    for number in range(5000):
        mutant = mutated(source, original)
        assert mutant == original or decoded_or_none(mutant) is None, f"{seed=} {number=}"


@given(st.dictionaries(st.integers(0, 230), st.integers(0, 255), max_size=6))
def test_a_header_has_one_form_only(changes):
    """Whatever a fitting checksum makes acceptable is the very page that encoding gives.

    So no byte of a header is left to a writer's taste, and a second implementation that differs is
    noticed at once.
    """
    page = bytearray(encode_header(a_header()))
    for offset, value in changes.items():
        page[offset] = value
    page = bytearray(sealed(page))

    header = decoded_or_none(bytes(page))

    assert header is None or bytes(page) == encode_header(header)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"PFXSTORY", MissReason.HEADER),
        (8, (0).to_bytes(2, "little"), MissReason.VERSION),
        (8, (2).to_bytes(2, "little"), MissReason.VERSION),
        (10, b"\x03", MissReason.HEADER),
        (11, b"\x00", MissReason.HEADER),
        (11, b"\x11", MissReason.HEADER),
        (12, b"\x0b", MissReason.HEADER),
        (12, b"\x41", MissReason.HEADER),
        (12, b"\x23", MissReason.HEADER),
        (13, b"\x00", MissReason.HEADER),
        (14, b"\x01", MissReason.HEADER),
        (16, (0).to_bytes(8, "little"), MissReason.HEADER),
        (16, (4999).to_bytes(8, "little"), MissReason.HEADER),
        (16, (RAW_BYTES_MAX + 1).to_bytes(8, "little"), MissReason.HEADER),
        (24, (0).to_bytes(8, "little"), MissReason.HEADER),
        (24, (4999).to_bytes(8, "little"), MissReason.HEADER),
        (24, (2**64 - 1).to_bytes(8, "little"), MissReason.HEADER),
        (224, b"\x01", MissReason.HEADER),
        (4079, b"\x01", MissReason.HEADER),
    ],
)
def test_a_lie_under_a_fitting_checksum_is_refused(offset, content, reason):
    """Lengths, numbers and zeros are checked one by one, whoever made the checksum."""
    assert reason == refusal(with_bytes(offset, content))


def test_a_newer_version_is_told_from_damage_whatever_else_it_holds():
    """A reader that is too old says so, since blobs of a newer writer are not damaged."""
    page = bytearray(b"\xff" * HEADER_BYTES)
    page[:10] = b"PFXSTORE" + (9).to_bytes(2, "little")

    assert refusal(sealed(page)) == MissReason.VERSION


@pytest.mark.parametrize("length", [0, 1, 224, HEADER_BYTES - 1])
def test_a_page_that_is_too_short_is_no_header(length):
    """A torn file may end anywhere."""
    assert refusal(encode_header(a_header())[:length]) == MissReason.HEADER


def test_a_page_of_zeros_is_no_header():
    """What a filesystem leaves after a power cut."""
    assert refusal(bytes(HEADER_BYTES)) == MissReason.HEADER


def test_bytes_behind_the_page_do_not_matter():
    """The header can be decoded in place, before its payload."""
    header = a_header()

    assert header == decode_header(memoryview(encode_header(header) + b"payload"))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": bytes(65)},
        {"element_bytes": 0},
        {"element_bytes": 17},
        {"raw_bytes": 0, "stored_bytes": 0},
        {"raw_bytes": RAW_BYTES_MAX + 1},
        {"stored_bytes": 5001},
        {"stored_bytes": 4999},
    ],
)
def test_what_no_reader_accepts_is_not_written(changes):
    """A writer's own mistake shows at once, not as a blob that nobody can load."""
    with pytest.raises(AssertionError):
        encode_header(a_header(**changes))


@given(st.integers(1, RAW_BYTES_MAX))
def test_a_file_is_the_header_and_whole_pages(stored_bytes):
    """The file's length is the least multiple of a page that holds header and payload."""
    length = file_bytes(stored_bytes)

    assert length % ALIGN_BYTES == 0
    assert 0 <= length - HEADER_BYTES - stored_bytes < ALIGN_BYTES


def test_every_codec_has_a_number():
    """A codec that the header cannot name would fail in the middle of a store."""
    numbers = {
        encode_header(a_header(codec=codec, stored_bytes=5000))[10]: codec for codec in Codec
    }

    assert numbers == {0: Codec.RAW, 1: Codec.ZSTD, 2: Codec.SHUFFLE_ZSTD}
