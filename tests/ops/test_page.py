"""The report of a root in words: what it says when there is nothing to tell, or not all of it."""

from pathlib import Path

import pytest

from prefixstore.cli.main import run
from prefixstore.ops.insight import gather
from prefixstore.ops.page import render
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, FILE_BYTES, RAW_BYTES, chain, load, store_chain


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return an empty root."""
    path = f"{tmp_path}/root"
    with PrefixStore.open(path, namespace=FIELDS, index=None, background=False):
        return path


def page_of(root: str, **options: int | None) -> str:
    """Return a root's report."""
    with PrefixStore.open(root, index=None, create=False) as store:
        found = gather(store, since_s=0, evict_to_bytes=options.get("evict_to_bytes"))
    return render(found, history_s=86400, prefill_tokens_per_s=options.get("rate"))


def fill(root: str) -> None:
    """Store a chain, look it up, load it."""
    with PrefixStore.open(root, namespace=FIELDS, index=None, background=False) as store:
        keys = chain("a", 10)
        store_chain(store, keys)
        store.longest_prefix([*keys, *chain("b", 10)])
        for key in keys:
            load(store, key)


def test_an_empty_root_is_no_error(root: str) -> None:
    """Every plot says why it is not there."""
    page = page_of(root)

    assert "<svg" not in page
    assert page.count("The root is empty.") == 3
    assert page.count("Nothing was counted yet") == 3
    assert "Nothing: the root holds no more than 0 B." in page


def test_what_was_saved_is_told_in_tokens_bytes_and_seconds(root: str) -> None:
    """Seconds only for a prefill rate that the operator gives: nobody else can know it."""
    fill(root)
    without, with_rate = page_of(root), page_of(root, rate=80)

    assert "<b>160</b><span>tokens not computed</span>" in without
    assert "of prefill saved" not in without
    assert "<b>2 s</b><span>of prefill saved, at 80 tokens/s</span>" in with_rate
    assert f"<b>{10 * RAW_BYTES / 1024:.1f} KiB</b><span>of KV loaded" in without


def test_the_next_eviction_is_planned_as_gc_would(root: str) -> None:
    """Chunks and bytes that would go for the limit that was asked about."""
    fill(root)

    assert "4 chunks with 48.0 KiB would go" in page_of(root, evict_to_bytes=6 * FILE_BYTES)


def test_names_from_the_root_are_text(tmp_path: Path) -> None:
    """A path with markup in it does not become part of the page."""
    path = f"{tmp_path}/<script>alert(1)</script>"
    with PrefixStore.open(path, namespace=FIELDS, index=None, background=False):
        pass

    assert "<script>" not in page_of(path)


def test_the_verb_writes_a_file_and_tells_what_is_missing(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, a warning and the page for a history that cannot be read in full."""
    fill(root)
    Path(root, "history", f"20991231-{'0' * 32}.json").write_text("no document")
    out = tmp_path / "report.html"
    code = run(["report", root, "--out", str(out)])

    assert code == 1
    assert "not everything is told" in capsys.readouterr().err
    assert "is not a valid DayDocument" in out.read_text()


def test_a_file_that_cannot_be_written_is_an_error_with_its_name(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that says what else to do."""
    code = run(["report", root, "--out", "/proc/nowhere.html"])

    assert code == 1
    assert "cannot write /proc/nowhere.html" in capsys.readouterr().err
