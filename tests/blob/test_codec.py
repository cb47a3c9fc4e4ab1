"""Payloads come back bit by bit, and hostile frames cost neither memory nor wrong bytes."""

import struct
import threading
import time
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from prefixstore.blob.codec import decode_into, encode, is_worth_it
from prefixstore.blob.reasons import MissReason
from prefixstore.config import Codec
from prefixstore.errors import CorruptError
from tests.blob.samples import bfloat16_noise

COMPRESSED = [Codec.ZSTD, Codec.SHUFFLE_ZSTD]


def decoded(
    stored: bytes | memoryview, size: int, *, codec: Codec, element_bytes: int = 2
) -> bytes:
    out = bytearray(size)
    decode_into(memoryview(stored), memoryview(out), codec=codec, element_bytes=element_bytes)
    return bytes(out)


def refusal(stored: bytes, size: int, *, codec: Codec = Codec.ZSTD) -> str:
    with pytest.raises(CorruptError) as caught:
        decoded(stored, size, codec=codec)
    assert caught.value.reason == MissReason.CODEC
    return str(caught.value)


def frame(payload: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(payload)


@given(
    payload=st.binary(min_size=1, max_size=4096),
    codec=st.sampled_from(Codec),
    element_bytes=st.integers(1, 16),
)
def test_a_payload_survives_the_round_trip(payload, codec, element_bytes):
    """Any bytes, elements of any size, whole or not."""
    stored = encode(memoryview(payload), codec=codec, element_bytes=element_bytes)

    assert payload == decoded(stored, len(payload), codec=codec, element_bytes=element_bytes)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 3_000_001])
def test_a_payload_of_many_zstd_blocks_survives(codec, size):
    """Block borders of zstd, at 128 KiB, are no borders of ours."""
    payload = (bfloat16_noise(50_000) * 40)[:size]
    stored = encode(memoryview(payload), codec=codec, element_bytes=2)

    assert payload == decoded(stored, size, codec=codec)


def test_raw_is_not_copied():
    """A raw payload is stored from where it lies."""
    payload = memoryview(bytearray(64))

    assert encode(payload, codec=Codec.RAW, element_bytes=2) is payload


def test_planes_put_first_bytes_first():
    """The layout of the format's description, with a tail that is no whole element."""
    stored = encode(memoryview(b"aAbBcC!"), codec=Codec.SHUFFLE_ZSTD, element_bytes=2)

    assert zstandard.ZstdDecompressor().decompress(stored) == b"abcABC!"


def test_planes_make_floats_smaller():
    """On numbers like those of KV, byte planes beat plain zstd."""
    payload = memoryview(bfloat16_noise(100_000))

    plain, planes = (len(encode(payload, codec=codec, element_bytes=2)) for codec in COMPRESSED)

    assert planes < plain


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (bfloat16_noise(10_000), True),
        (zstandard.ZstdCompressor().compress(bfloat16_noise(9000)), False),
    ],
)
def test_a_sample_tells_whether_compressing_pays(payload, expected):
    """Floats do; what is compressed already does not."""
    assert expected == is_worth_it(memoryview(payload), codec=Codec.SHUFFLE_ZSTD, element_bytes=2)


@pytest.mark.parametrize("codec", Codec)
def test_another_length_than_wanted_is_refused(codec):
    """One byte more or less than the engine's chunk is no chunk of it."""
    stored = bytes(encode(memoryview(bytes(1000)), codec=codec, element_bytes=2))

    refusal(stored, 999, codec=codec)
    refusal(stored, 1001, codec=codec)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_bomb_is_refused_before_it_goes_off(codec):
    """64 MiB in two kilobytes: the size stated in the frame is not the size wanted."""
    bomb = frame(bytes(64 * 2**20))
    assert len(bomb) < 10_000

    tracemalloc.start()
    try:
        assert "states 67108864 bytes" in refusal(bomb, 4096, codec=codec)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1_000_000


def test_a_frame_that_decodes_to_more_than_it_states_is_refused():
    """A bomb with a modest label never writes past the memory that was given to it."""
    honest = frame(bytes(64 * 2**20))
    parameters = zstandard.get_frame_parameters(honest)
    assert parameters.content_size == 64 * 2**20
    stated = honest.index((64 * 2**20).to_bytes(4, "little"))
    lying = honest[:stated] + (4096).to_bytes(4, "little") + honest[stated + 4 :]
    guarded = bytearray(b"\xee" * 8192)

    with pytest.raises(CorruptError):
        decode_into(
            memoryview(lying), memoryview(guarded)[:4096], codec=Codec.ZSTD, element_bytes=2
        )

    assert guarded[4096:] == b"\xee" * 4096


def test_a_frame_that_decodes_to_less_than_it_states_is_refused():
    """Missing bytes would be what the buffer held before: another prompt's KV."""
    small = frame(bytes(range(256)) * 4)
    stated = small.index((1024 - 256).to_bytes(2, "little"))
    lying = small[:stated] + (2048 - 256).to_bytes(2, "little") + small[stated + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == 2048

    refusal(lying, 2048)


@pytest.mark.parametrize(
    "tail",
    [
        b"\0",
        b"garbage",
        frame(b""),
        frame(bytes(1000)),
        b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip",
    ],
    ids=["zero", "garbage", "empty frame", "second frame", "skippable frame"],
)
def test_bytes_behind_the_frame_are_refused(tail):
    """The stored bytes are one frame and nothing else."""
    assert "the frame ends at" in refusal(frame(bytes(1000)) + tail, 1000)


def test_a_skippable_frame_first_is_refused():
    """It may state any size and decodes to nothing."""
    skippable = b"\x50\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000)

    refusal(skippable, 1000)
    refusal(skippable + frame(bytes(1000)), 1000)


def test_a_frame_without_its_size_is_refused():
    """Without it, memory would have to be guessed."""
    refusal(frame(bytes(1000), write_content_size=False), 1000)


def test_a_frame_with_a_dictionary_is_refused():
    """A blob is described by itself alone."""
    dictionary = zstandard.ZstdCompressionDict(bytes(range(256)) * 40, dict_type=1)
    dictionary = zstandard.train_dictionary(2048, [bytes([n] * 40) + b"kv" * n for n in range(200)])
    stored = zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(1000))

    refusal(stored, 1000)


def test_a_frame_with_a_huge_window_is_refused():
    """A window is memory that the frame asks for."""
    parameters = zstandard.ZstdCompressionParameters(window_log=25)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(
        size=48 * 2**20
    )
    stored = compressor.compress(bytes(48 * 2**20)) + compressor.flush()

    assert "window of" in refusal(stored, 48 * 2**20)


def test_a_frame_of_a_million_empty_blocks_is_refused():
    """Walking blocks is work that grows with the payload, not with what a liar stores."""
    header = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 4096)
    empty_block = b"\0\0\0"
    started = time.monotonic()

    assert "more blocks" in refusal(header + empty_block * 1_000_000 + b"\1\0\0", 4096)

    assert time.monotonic() - started < 1.0


def test_a_frame_checksum_is_checked_and_counted():
    """Another writer may add one: it is part of the frame."""
    stored = frame(bfloat16_noise(500), write_checksum=True)

    assert bfloat16_noise(500) == decoded(stored, 1000, codec=Codec.ZSTD)
    refusal(stored[:-1] + bytes([stored[-1] ^ 1]), 1000)
    refusal(stored[:-1], 1000)


@given(st.data())
def test_a_mutated_frame_decodes_equally_or_is_refused(data):
    """Without a digest before it, a codec may give other bytes, but never another error or length."""
    original = bytearray(frame(bfloat16_noise(800)))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.none() | st.integers(0, len(original)))

    try:
        raw = decoded(bytes(original[:cut]), 1600, codec=Codec.ZSTD)
    except CorruptError:
        return
    assert len(raw) == 1600


@given(st.binary(max_size=200), st.sampled_from(COMPRESSED))
def test_noise_is_refused(noise, codec):
    """Bytes that were never a frame."""
    refusal(noise, 1000, codec=codec)
    refusal(b"\x28\xb5\x2f\xfd" + noise[:3], 1000, codec=codec)


def test_threads_do_not_disturb_each_other():
    """Contexts are not shared between calls."""
    payloads = [bfloat16_noise(20_000, seed=seed) for seed in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            for codec in COMPRESSED:
                stored = encode(memoryview(payloads[number]), codec=codec, element_bytes=2)
                if decoded(stored, 40_000, codec=codec) != payloads[number]:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
