"""Damaged blobs under a real engine: found, set aside, computed again, and never served."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixstore.blob.header import HEADER_BYTES
from tests.vllm import stores
from tests.vllm.engine import Generation
from tests.vllm.stores import BLOCK_TOKENS, Place

CHUNKS_EACH = 10
PROMPTS = [stores.tokens(100 + i, CHUNKS_EACH * BLOCK_TOKENS + 20) for i in range(5)]


def flip_a_bit(blob: Path, _other: Path) -> None:
    """One bit of the payload."""
    data = bytearray(blob.read_bytes())
    data[HEADER_BYTES + 1234] ^= 0x10
    blob.write_bytes(data)


def truncate(blob: Path, _other: Path) -> None:
    """A file that lost its second half."""
    with blob.open("r+b") as file:
        file.truncate(blob.stat().st_size // 2)


def delete(blob: Path, _other: Path) -> None:
    """A file that somebody removed; the index still promises it."""
    blob.unlink()


def replace(blob: Path, other: Path) -> None:
    """Another chunk's sound blob under this one's name."""
    blob.write_bytes(other.read_bytes())


def damage_the_header(blob: Path, _other: Path) -> None:
    """A header that is not what was written."""
    with blob.open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)


# Which chunk of which prompt, and the reason that metrics must tell.
DAMAGE: list[tuple[Callable[[Path, Path], None], int, str]] = [
    (flip_a_bit, 3, "digest"),
    (truncate, 0, "torn"),
    (delete, 5, "absent"),
    (replace, 7, "key"),
    (damage_the_header, 8, "header"),
]


@pytest.fixture
def chains(place: Place, tiny_llama: Path) -> tuple[list[Generation], list[list[Path]]]:
    """Fill the root; give the answers and each prompt's blobs in the order of the prompt."""
    answers: list[Generation] = []
    chains: list[list[Path]] = []
    known: set[str] = set()
    with place.engine(tiny_llama) as engine:
        for number, prompt in enumerate(PROMPTS, start=1):
            answers += engine.generate([prompt], logprobs=1)
            blobs = place.await_blobs(number * CHUNKS_EACH)
            new = [blobs[key] for key in blobs.keys() - known]
            chains.append(sorted(new, key=lambda blob: stores.header_of(blob).end_token))
            known |= blobs.keys()
    return answers, chains


def test_every_tenth_blob_damaged_costs_only_a_recompute(
    place: Place, tiny_llama: Path, chains: tuple[list[Generation], list[list[Path]]]
) -> None:
    """Each damage is a miss with its reason, the answers are the same, and the root heals."""
    cold, blobs = chains
    for (damage, position, _), chain in zip(DAMAGE, blobs, strict=True):
        damage(chain[position], chain[position - 1])

    with place.engine(tiny_llama) as engine:
        warm = engine.generate_each(PROMPTS)
        again = engine.generate_each(PROMPTS)
        stores.until(lambda: len(place.blobs()) == 50, "all chunks to be published again")
        reasons = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        failures = stores.labelled(engine, "vllm:prefixstore_failed_callbacks", "callback")

    assert stores.outputs(cold) == stores.outputs(warm) == stores.outputs(again)
    assert [position for _, position, _ in DAMAGE] == stores.cached_chunks(warm)
    assert {reason: 1 for _, _, reason in DAMAGE} == reasons
    assert {} == failures
    assert 4 == len(place.quarantined()), "all but the deleted one"
    with place.engine(tiny_llama) as engine:
        healed = engine.generate_each(PROMPTS)
    assert [CHUNKS_EACH] * len(PROMPTS) == stores.cached_chunks(healed)
    assert stores.outputs(cold) == stores.outputs(healed)


def test_a_root_of_junk_is_a_miss(tiny_llama: Path, filled: Place) -> None:
    """With every single blob overwritten the engine computes everything, and says so."""
    for blob in filled.blobs().values():
        blob.write_bytes(b"junk" * (blob.stat().st_size // 4))
    with filled.engine(tiny_llama) as engine:
        first = engine.generate_each(stores.PROMPTS)
        reasons = stores.labelled(engine, "vllm:prefixstore_load_misses", "reason")
        second = engine.generate_each(stores.PROMPTS)

    assert 0 == first[0].cached_tokens
    assert {"header"} == reasons.keys()
    assert stores.outputs(first) == stores.outputs(second)
