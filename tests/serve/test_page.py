"""The page in a real browser: Debian's chromium, driven by playwright where both are installed."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page()
        found.told = []  # what went wrong there
        found.on("console", lambda message: found.told.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: found.told.append(str(error)))
        found.goto(address)
        found.wait_for_selector("#model option", state="attached")
        yield found
        browser.close()


def test_two_answers_side_by_side(page: Any) -> None:
    page.fill("#prompt", "hello")
    page.check("#beside")
    page.fill("#budget", "1")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(".answer:nth-of-type(2) .figures:has-text('6.0 layers a token')")
    page.wait_for_selector("#send:not([disabled])")
    assert page.locator(".answer").count() == 2
    for number in range(2):
        card = page.locator(".answer").nth(number)
        assert card.locator(".text").inner_text()
        assert "6.0 of 6 layers each" in card.locator("canvas").get_attribute("aria-label")
    assert page.told == []


def test_an_error_is_told(page: Any) -> None:
    page.fill("#prompt", "a b " * 500)
    page.click("#send")
    page.wait_for_selector(".figures.error:has-text('context')")
    page.wait_for_selector("#send:not([disabled])")
