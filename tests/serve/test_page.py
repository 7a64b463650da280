"""The page in a real browser: Debian's chromium, driven by playwright where both are installed; axe checks it."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Serve, slow_down

OpenPage = Callable[..., Any]
SETTINGS = {"length": "12", "temperature": "0"}
HOSTILE = "Look:\n\n1. <img src=x onerror=alert(1)> **bold** `a < b`\n\n```html\n<script>alert(2)</script>\n```\nEnd"


@pytest.fixture
def open_page(browse: OpenPage, address: str) -> OpenPage:
    """`open_page(address, settings, **context)`: the page with these settings, by default on the shared server."""
    return lambda at=address, settings=SETTINGS, **context: browse(at, settings, **context)


@pytest.fixture
def page(open_page: OpenPage) -> Any:
    page = open_page()
    page.wait_for_selector("#model option", state="attached")
    return page


def answered(page: Any, turns: int) -> None:
    page.wait_for_selector(f"article:nth-of-type({turns}) .figures:has-text('layers a token')")
    page.wait_for_selector("#send:text-is('Send')")


def say(page: Any, text: str, turns: int) -> None:
    """Send the text as the turn with this number, from the field that has the focus."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    answered(page, turns)


def test_three_turns_by_keyboard_alone(page: Any) -> None:
    say(page, "hello", 1)
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    say(page, "lines", 2)
    say(page, "and now", 3)
    messages = page.sent[-1]["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2 + ["user"]
    assert [one["content"] for one in messages[::2]] == ["hello", "two\nlines", "and now"]
    assert messages[1]["content"]
    assert page.sent[-1]["max_tokens"] == 12
    assert page.input_value("#prompt") == ""
    assert page.told == []


def test_an_answer_is_stopped(open_page: OpenPage, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(0.05, monkeypatch)
    page = open_page(serve(), SETTINGS | {"length": "400"})

    def begin() -> float:
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(".text > div")
        return page.locator(".text").bounding_box()["y"]

    top = begin()
    page.keyboard.type("next")  # while it answers; Enter waits
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.wait_for_selector(".figures:has-text('stopped')")
    assert page.locator("article").count() == 1
    assert page.locator(".text").inner_text()
    assert page.locator(".text").bounding_box()["y"] == top  # it kept its place
    assert page.input_value("#prompt") == "next"
    page.fill("#prompt", "")
    page.click("#new")
    begin()
    page.click("#send:text-is('Stop')")
    page.wait_for_selector(".figures:has-text('stopped')")
    page.click("#new")
    begin()
    page.click("#new")
    page.click("#chats li:first-child button:first-child")
    assert page.locator(".text").inner_text()  # another conversation stops it, and what was there stays
    assert page.told == []


def test_edit_and_retry(page: Any) -> None:
    say(page, "hello", 1)
    say(page, "again", 2)
    page.keyboard.press("ArrowUp")
    page.keyboard.type("not ")
    page.keyboard.press("Escape")
    assert page.locator(".bubble").all_inner_texts() == ["hello", "again"]
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    say(page, " and again", 2)
    assert page.locator(".bubble").all_inner_texts() == ["hello", "again and again"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("article").first.get_by_role("button", name="Retry").press("Enter")
    page.wait_for_selector("article:nth-of-type(2)", state="detached")
    answered(page, 1)
    assert [one["content"] for one in page.sent[-1]["messages"]] == ["hello"]
    assert page.sent[-1]["seed"] != page.sent[0]["seed"]
    say(page, "more", 2)
    assert page.told == []


def test_the_skip_map_is_a_strip_that_opens(open_page: OpenPage) -> None:
    page = open_page(settings=SETTINGS | {"length": "60"})  # more rows than the window has
    page.select_option("#budget", "0.90")
    page.focus("#prompt")
    say(page, "hello", 1)
    assert page.sent[-1]["dash"] == {"skips": True, "budget": 0.9}
    strip, text = (page.locator(one).bounding_box() for one in (".strip", ".text"))
    assert strip["width"] < 40
    assert (strip["y"], strip["height"]) == (text["y"], text["height"])
    label = page.get_attribute(".strip", "aria-label")
    assert re.fullmatch(r"Skip map: \d+ tokens, \d\.\d of 6 layers each", label)
    page.press(".strip", "Enter")
    assert page.locator("#map-title").inner_text() == label
    tokens = page.locator("#tokens div").count()
    grid = page.locator("#whole").bounding_box()
    assert grid["height"] == pytest.approx(18 * tokens)
    assert [page.locator("#whole").evaluate(f"one => one.{side}") for side in ("width", "height")] == [6, tokens]
    page.keyboard.press("Escape")
    assert not page.is_visible("#map")


def test_the_key_is_asked_for_where_one_is_needed(open_page: OpenPage, serve: Serve) -> None:
    page = open_page(serve(keys=["secret"]))
    for given in ("wrong", "secret"):
        page.wait_for_selector("#key:focus")
        page.keyboard.type(given)
        page.keyboard.press("Enter")
        if given == "wrong":
            page.wait_for_selector("#refused:visible")
            page.fill("#key", "")
    page.wait_for_selector("#model option", state="attached")
    say(page, "hello", 1)
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.wait_for_selector("#key:focus")
    page.check("#keep")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model option", state="attached")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert not page.is_visible("#settings")
    page.click("text=Settings")
    page.uncheck("#keep")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_conversations_and_settings_stay(page: Any) -> None:
    page.click("text=Settings")
    assert not page.is_visible("#key"), "none is needed"
    page.fill("#system", "Be short.")
    page.fill("#temperature", "0.5")
    page.keyboard.press("Enter")
    page.focus("#prompt")
    say(page, "hello", 1)
    text = page.locator(".text").inner_text()
    page.reload()
    assert page.locator(".text").inner_text() == text
    say(page, "again", 2)
    assert [one["role"] for one in page.sent[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert (page.sent[-1]["messages"][0]["content"], page.sent[-1]["temperature"]) == ("Be short.", 0.5)
    page.click("text=New conversation")
    say(page, "another", 1)
    assert page.locator("#chats li").count() == 2
    page.click("#chats button:text-is('hello')")
    assert page.locator("article").count() == 2
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete: hello']")
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator(".bubble").all_inner_texts() == ["another"]


def test_text_of_a_model_is_text(page: Any) -> None:
    chunk = {"model": "tiny", "choices": [{"delta": {"content": HOSTILE}}], "dash": {"skipped_layers": [], "layers": 6}}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.keyboard.type("<b>hello</b>")
    page.keyboard.press("Enter")
    page.wait_for_selector(".text pre")
    assert page.locator(".bubble").inner_text() == "<b>hello</b>"
    assert page.locator(".text .item").inner_text() == "1.<img src=x onerror=alert(1)> bold a < b"
    assert page.locator(".text pre").inner_text() == "<script>alert(2)</script>\n"
    assert page.locator(".text").locator("img, script").count() == 0
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".code").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "<script>alert(2)</script>\n"
    page.locator(".answer > .tools").get_by_role("button", name="Copy").click()
    page.wait_for_selector(".answer > .tools >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == HOSTILE
    assert page.told == []


def test_errors_are_told(page: Any) -> None:
    page.fill("#prompt", "a b " * 500)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".figures.error:has-text('context')")
    page.wait_for_selector("#send:text-is('Send')")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say_next = page.locator("#prompt")
    say_next.fill("hello")
    say_next.press("Enter")
    page.wait_for_selector(".figures.error:has-text('does not answer')")
    page.unroute("**/v1/chat/completions")
    page.locator("article").nth(1).get_by_role("button", name="Retry").click()
    answered(page, 2)
    assert [one["content"] for one in page.sent[-1]["messages"]] == ["hello"]  # what failed is not sent again


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_axe_finds_nothing(open_page: OpenPage, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    page = open_page(viewport={"width": width, "height": 740}, color_scheme=scheme)

    def check(where: str) -> None:
        found = axe.run(page).response["violations"]
        assert not found, (where, [(one["id"], [node["html"] for node in one["nodes"]]) for one in found])
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.wait_for_selector("#model option", state="attached")
    check("empty")
    say(page, "hello", 1)
    page.get_by_role("button", name="Dense beside").click()
    page.wait_for_selector(".answer:nth-of-type(2) .figures:has-text('6.0 layers a token')")
    assert page.sent[1]["dash"] == {"skips": True, "policy": "dense"}
    assert page.sent[1]["messages"] == page.sent[0]["messages"]
    check("conversation")
    for opener in ("Settings", "Help", "Skip map"):
        page.get_by_role("button", name=opener).first.press("Enter")
        check(opener)
        page.keyboard.press("Escape")
    if width < 1000:
        page.press("#open-chats", "Enter")
        check("conversations")
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Edit").press("Enter")
    check("edit")


def test_damaged_records_are_no_conversations(page: Any) -> None:
    for name, text in {"settings": "{", "chat.5": "{", "chat.6": "[]", "chat.x": "[]", "chat.7": "[null, 3]"}.items():
        page.evaluate("([name, text]) => { localStorage[`dash-export.${name}`] = text }", [name, text])
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#chats li").count() == 0
    page.click("text=Settings")
    assert page.input_value("#length") == "512"
    assert page.told == []
