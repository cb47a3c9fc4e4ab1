"""A vLLM that is not the one we know: named at start, and never a failure while serving."""

import logging

import pytest

from prefixstore.vllm import compat


class Renamed:
    kept = 1


def test_this_vllm_has_every_seam() -> None:
    """What prefixstore reads of vLLM's private parts is there."""
    assert [] == compat.missing_seams()


def test_a_seam_that_is_gone_is_named() -> None:
    """The engine then serves with the store off, and its log names what is missing."""
    assert ["Renamed.gone"] == compat.missing_seams([(Renamed, "kept"), (Renamed, "gone")])


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.32.0", False), ("0.33.1", False), ("0.34.0", True), ("1.0.dev5+g1", True)],
)
def test_an_unknown_version_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, *, warned: bool
) -> None:
    """A version that was never tried is said so once, at start."""
    monkeypatch.setattr(compat, "version", version)
    monkeypatch.setattr(logging.getLogger("prefixstore"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="prefixstore"):
        compat.check_version()

    assert warned is (f"vLLM {version} was never tried" in caplog.text)
