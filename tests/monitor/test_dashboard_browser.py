"""The page in a real Chromium: both themes, narrow and wide, by keyboard, with hostile names, live."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from page_world import (
    IMG,
    LONG_TITLE,
    PLAIN_USER,
    RTL_ITEM,
    SCRIPT_USER,
    START_MS,
    FakeTriton,
    hostile_world,
    line,
    served,
    sources,
    triton,
)

from onerec.dashboard.names import read_titles
from onerec.dashboard.page import Page

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[test]'")
CHROMIUM = shutil.which("chromium-headless-shell")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium-headless-shell is not installed")

OUTLINES = """() => { const s = getComputedStyle(document.activeElement);
  const near = document.activeElement.nextElementSibling && getComputedStyle(document.activeElement.nextElementSibling);
  return [document.activeElement.id || document.activeElement.textContent.trim().slice(0, 40) || document.activeElement.tagName,
          s.outlineStyle !== "none" || (near !== null && near.outlineStyle !== "none")]; }"""

AUDITED = ((400, "light"), (1600, "dark"))
"""Where axe looks, which takes long: each width and each theme once."""
INSIDE = """[...document.querySelectorAll("main *")].every((e) => e.getBoundingClientRect().right <= innerWidth + 1
  || e.closest(".scroll, .whole, .line, .u-wrap, .hidden"))"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model() -> FakeTriton:
    return FakeTriton()


@pytest.fixture(scope="module")
def url(world: Path, model: FakeTriton) -> Iterator[str]:
    titles = read_titles(world / "names.jsonl")
    with triton(model) as address, served(Page(sources(world, address), titles=titles)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Without the sandbox: containers run as root.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page that remembers what went wrong in it and whom it asked."""

    def __init__(self, browser: Any, width: int = 1600, theme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))

    def open(self, url: str, **query: str) -> Any:
        self.page.goto(f"{url}/?{urlencode(query)}" if query else url)
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    found = Tab(browser)
    yield found
    found.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_is_sound_in_both_themes_narrow_and_wide(browser: Any, url: str, width: int, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tab = Tab(browser, width, theme)
    page = tab.open(url, user=SCRIPT_USER)
    page.wait_for_selector("#sides .items li")
    for summary in page.locator("details > summary").all():
        summary.evaluate("each => { each.parentElement.open = true }")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(INSIDE)
    assert page.locator(".plot canvas").count() == 4
    if (width, theme) in AUDITED:
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []
    assert tab.wrong == []
    assert {asked.startswith(url) for asked in tab.asked} == {True}
    tab.close()


def test_hostile_names_are_text(tab: Tab, url: str) -> None:
    page = tab.open(url, user=SCRIPT_USER)
    page.wait_for_selector("#sides .items li")
    for summary in page.locator("details > summary").all():
        summary.evaluate("each => { each.parentElement.open = true }")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b:not(.legend b)").count() == 0
    sides = page.locator("#sides").inner_text()
    assert IMG + " title" in sides and RTL_ITEM in sides and "<b>bold</b>" in sides
    assert IMG + " was refused" in page.locator("#versions").inner_text()
    assert "<script>window.hacked=1</script>" in page.locator("#dead").inner_text()
    assert page.locator("#user-id").input_value() == SCRIPT_USER
    # Right-to-left names keep to themselves, and a long one is cut with all of it at hand.
    assert page.locator(f"#sides bdi:text-is('{RTL_ITEM}')").count() >= 2
    cut = page.locator("#sides details.long").filter(has_text="long long").first
    assert cut.locator("summary").inner_text().endswith("…") and cut.locator("summary").inner_text().count("long") < 40
    assert cut.locator(".whole").text_content() == LONG_TITLE
    assert tab.wrong == []


def test_the_keyboard_gets_everywhere_and_always_shows_where_it_is(tab: Tab, url: str) -> None:
    page = tab.open(url)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        seen.append(page.evaluate(OUTLINES))
    names = [name for name, _ in seen]
    assert [name for name, ring in seen if not ring] == []
    assert names[0] == "Skip to content" and {"Chain", "user-id", "Show", "random-user", "Hit rate as a table"} <= set(names)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("#user-id").focus()
    page.keyboard.type(PLAIN_USER)
    page.keyboard.press("Enter")
    page.wait_for_selector("#sides .items li")
    assert f"user={PLAIN_USER}" in page.url
    page.locator("summary", has_text="Hit rate as a table").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#hits table tbody tr")).not_to_have_count(0)
    assert tab.wrong == []


def test_the_theme_is_chosen_and_remembered(tab: Tab, url: str) -> None:
    page = tab.open(url)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator("#theme input[value=system]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    dark = page.evaluate(background)
    assert dark != light
    tab.open(url)
    assert page.evaluate(background) == dark and page.locator("#theme input[value=dark]").is_checked()
    page.locator("#theme input[value=dark]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(background) == light


def test_what_changes_is_seen_without_a_reload(tab: Tab, world: Path, url: str, model: FakeTriton) -> None:
    page = tab.open(url, user=PLAIN_USER)
    page.wait_for_selector("#sides .items li")
    page.evaluate("window.same = true")
    replicas = page.locator("#replicas")
    assert "no data" not in page.locator("#headline").inner_text()
    spoken = page.locator("#spoken").inner_text()
    asked = len(model.users)
    model.version, model.watermark = 2, START_MS + 110_000
    with (world / "run" / "metrics.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(line(4_321, START_MS + 200_000_000)) + b"\n")
    sync_api.expect(replicas).to_contain_text("Version\n2", use_inner_text=True, timeout=10_000)
    sync_api.expect(page.locator("#losses-note")).to_contain_text("4 321", timeout=10_000)
    # A new version answers: what the user is recommended is asked anew.
    sync_api.expect(page.locator("#sides")).to_contain_text("Version 2 at", timeout=10_000)
    assert len(model.users) > asked and page.evaluate("window.same")
    # The age went down by less than a verdict: nothing is said aloud.
    assert page.locator("#spoken").inner_text() == spoken
    assert tab.wrong == []


def test_a_triton_that_goes_down_is_said_and_comes_back(tab: Tab, world: Path) -> None:
    model = FakeTriton()
    with triton(model) as address:
        page_of = Page(sources(world, address))
        running = served(page_of)
        url = running.__enter__()
        page = tab.open(url)
        sync_api.expect(page.locator("#replicas")).to_contain_text("answers")
    try:
        sync_api.expect(page.locator("#replicas")).to_contain_text("No answer", timeout=15_000)
        sync_api.expect(page.locator("#headline")).to_have_text("no data")
        assert "no data" in page.locator("#spoken").inner_text().lower()
        with triton(model, int(address.rpartition(":")[2])):
            sync_api.expect(page.locator("#replicas")).to_contain_text("answers", timeout=15_000)
            sync_api.expect(page.locator("#headline")).not_to_have_text("no data")
    finally:
        running.__exit__(None, None, None)
    assert tab.wrong == []


def test_with_nothing_there_it_says_so_and_shows_no_zero(tab: Tab, tmp_path: Path) -> None:
    with served(Page(sources(tmp_path, "127.0.0.1:1"))) as url:
        page = tab.open(url, user="x")
        page.wait_for_selector("#sides .fault")
        sync_api.expect(page.locator("#headline")).to_have_text("no data")
        text = page.locator("main").inner_text()
        assert text.count("there is none") >= 4 and "0 ms" not in text
        assert page.locator("#stages .age").all_inner_texts() == ["no data"] * 7
        assert page.evaluate("document.documentElement.scrollWidth") <= 1600
        assert tab.wrong == []


def test_a_server_that_is_gone_is_said(tab: Tab, tmp_path: Path) -> None:
    with served(Page(sources(tmp_path, "127.0.0.1:1"))) as url:
        page = tab.open(url)
        sync_api.expect(page.locator("#live-text")).to_have_text("live")
    began = time.monotonic()
    sync_api.expect(page.locator("#live-text")).to_have_text("no connection; trying again", timeout=10_000)
    assert time.monotonic() - began < 10
