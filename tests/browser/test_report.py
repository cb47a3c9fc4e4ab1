"""The report of a root as people see it: on a desk, and on a phone at three in the morning."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from prefixstore.ops.insight import gather
from prefixstore.ops.page import render
from prefixstore.store import PrefixStore
from prefixstore.testing.chains import FIELDS, chain, load, store_chain

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PLOTS = (
    "What fills the root",
    "Hit rate",
    "Bytes moved",
    "Tokens not computed",
    "Age of what is kept",
    "Depth of what is kept",
)
READABLE_PX = 8
"""The height of a line of small print; the plots' letters are as large as they were drawn, or larger."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a root with chunks, a pin and a history."""
    directory = tmp_path_factory.mktemp("report")
    root = f"{directory}/root"
    with PrefixStore.open(root, namespace=FIELDS, index=None, background=False) as store:
        keys = chain("a", 40)
        store_chain(store, keys)
        store.longest_prefix(keys)
        for key in keys:
            load(store, key)
        store.pin("system-prompt", keys[:8])
    with PrefixStore.open(root, index=None, create=False) as store:
        insight = gather(store, since_s=0, evict_to_bytes=None)
    path = directory / "report.html"
    path.write_text(render(insight, history_s=7 * 86400, prefill_tokens_per_s=1000))
    return path


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """Return the report, opened; it fetches nothing and complains of nothing."""
    context = browser.new_context(viewport=request.param, offline=True)
    opened = context.new_page()
    said, fetched = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("request", lambda asked: fetched.append(asked.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == []
    assert fetched == [report.as_uri()]
    context.close()


def test_every_question_has_its_picture(page: Page) -> None:
    """Six plots, each with something drawn in it, under a heading that says what it is."""
    headings = page.locator(".plots h2").all_inner_texts()
    drawn = page.locator(".plots svg").evaluate_all(
        "all => all.map(svg => svg.getBoundingClientRect().width > 200"
        " && svg.querySelectorAll('path').length > 5)"
    )

    assert tuple(headings) == PLOTS
    assert drawn == [True] * len(PLOTS)


def test_nothing_runs_out_of_the_page(page: Page) -> None:
    """One scrolls down, never sideways."""
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")

    assert widths[0] <= widths[1]


def test_letters_can_be_read(page: Page) -> None:
    """No text of a plot is smaller than small print, on a phone either."""
    heights = page.locator(".plots svg text").evaluate_all(
        "all => all.map(text => parseFloat(getComputedStyle(text).fontSize)"
        " * text.getScreenCTM().a).filter(height => height > 0)"
    )

    assert len(heights) > 30
    assert [height for height in heights if height < READABLE_PX] == []


def test_the_figures_are_those_of_the_root(page: Page) -> None:
    """What was stored, found, loaded, pinned, and what goes next."""
    text = page.locator("main").inner_text()

    assert "stored in 40 chunks" in text
    assert "100%\nof chunks found" in text
    assert "640\ntokens not computed" in text
    assert "held by 1 pins" in text
    assert "4 chunks with 48.0 KiB would go" in text


def test_a_picture_of_it_is_not_blank(page: Page, tmp_path: Path) -> None:
    """Ink of the plots and of the letters is on the screen, not only in the document."""
    from PIL import Image

    shot = tmp_path / "shot.png"
    page.screenshot(path=shot, full_page=True)
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**20)
    seen = {colour: count for count, colour in colours}

    assert seen.get((0x2B, 0x6C, 0xB0), 0) > 500
    assert seen.get((0x1C, 0x23, 0x30), 0) > 50
