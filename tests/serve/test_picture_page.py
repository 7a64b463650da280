"""The page of an image encoder in a real browser, with real pictures read by a tiny one."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.serve.picture_server import PictureQueue, PictureServer
from tests.listening import listening
from tests.tiny_encoder import encoder_bundle

OpenPage = Callable[..., Any]
HOSTILE = "<img src=x onerror=alert(1)>"
SETTING = Setting("static", skip=(2, 3, 4))
FILES = ("", "page.css", "picture_page.js", "parts.js")


def picture(seed: int, width: int = 50, height: int = 42) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


def given(seed: int, name: str = "", **sizes: int) -> dict[str, Any]:
    return {"name": name or f"{seed}.png", "mimeType": "image/png", "buffer": picture(seed, **sizes)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DashRuntime:
    return DashRuntime.load(encoder_bundle(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> DashRuntime:
    """Its classes have names that a page could take for elements."""
    names = {place: f"{HOSTILE} {place}" for place in range(3)}
    return DashRuntime.load(encoder_bundle(tmp_path_factory.mktemp("classes"), "vit-classes", id2label=names))


@pytest.fixture
def serve(plain: DashRuntime) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def make(runtime: DashRuntime = plain, **options: Any) -> str:
            queue = PictureQueue(runtime, setting=SETTING)
            return stack.enter_context(listening(PictureServer({"tiny": queue}, drain=5.0, **options).app))

        yield make


@pytest.fixture
def open_page(browse: OpenPage, serve: Callable[..., str]) -> OpenPage:
    """`open_page(address, **context)`: the page, by default that of a model without classes."""

    return lambda at="", **context: browse(at or serve(), {}, **context)


@pytest.fixture
def page(open_page: OpenPage) -> Any:
    page = open_page()
    page.wait_for_selector("#model option", state="attached")
    return page


def choose(page: Any, file: Any) -> None:
    """Choose a file, and wait for the answer."""
    page.set_input_files("#file", file)
    name = file["name"]
    page.wait_for_function("name => document.getElementById('caption').textContent.includes(name)", arg=name)
    settled(page)


def settled(page: Any) -> None:
    page.wait_for_selector("#answer[aria-busy=false]")


def test_a_picture_by_keyboard(page: Any) -> None:
    """It is chosen, and read once more at every other budget."""
    page.keyboard.press("Tab")
    for _ in range(9):
        if page.evaluate("document.activeElement.id") == "choose":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.locator("#choose").press("Enter")
    chooser.value.set_files([given(1)])
    page.wait_for_selector("#verdict:text-is('2 of 5 layers ran')")
    assert page.sent[-1]["dash"] == {}
    assert page.sent[-1]["input"] == [f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"]
    assert page.locator("#layers li").all_inner_texts() == ["0\nrun", "1\nrun", "2\nskip", "3\nskip", "4\nskip"]
    assert page.locator("#guard").inner_text() == "Not guarded."
    assert re.match(r"recommended budget · \d+ ms · 0\.\d\d of dense time", page.locator("#figures").inner_text())
    assert page.get_attribute("#picture", "aria-label") == "1.png, with the grid of its patches: 3 across, 3 down"
    assert not page.is_visible("#classes")
    page.focus("#budget")
    page.keyboard.press("End")
    page.wait_for_selector("#verdict:text-is('All 5 layers ran')")
    assert page.sent[-1]["dash"] == {"policy": "dense"}
    assert not page.is_checked("#recommended")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#error:has-text('This build has no calibrated dial')")
    assert page.locator("#verdict").inner_text() == "All 5 layers ran"
    assert page.sent[-1]["dash"] == {"budget": 0.95}
    assert page.locator("#budget-told").inner_text() == "0.95"
    page.check("#recommended")
    page.wait_for_selector("#verdict:text-is('2 of 5 layers ran')")
    assert page.sent[-1]["dash"] == {}
    assert not page.is_visible("#error")
    (refused,) = page.told
    assert "400 (Bad Request)" in refused


def test_how_alike_two_pictures_are(page: Any, plain: DashRuntime) -> None:
    choose(page, given(1))
    assert "Drop another picture" in page.locator("#alike").inner_text()
    choose(page, given(2))
    vectors = plain.encoder_with(SETTING)([picture(1), picture(2)]).pooled
    one, other = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert page.locator("#alike").inner_text() == f"Cosine with 1.png: {one @ other:.4f}"
    page.focus("#budget")
    page.keyboard.press("End")
    page.wait_for_selector("#verdict:text-is('All 5 layers ran')")
    assert "Cosine with 1.png" in page.locator("#alike").inner_text(), "the same picture is none before itself"
    page.check("#recommended")
    page.wait_for_selector("#verdict:text-is('2 of 5 layers ran')")
    choose(page, given(2, "again.png"))
    assert page.locator("#alike").inner_text() == "Cosine with 2.png: 1.0000"


def test_a_picture_is_dropped_or_pasted(page: Any) -> None:
    code = """([name, bytes]) => {
        const held = new DataTransfer();
        if (name) held.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
        return held;
    }"""

    def held(name: str) -> Any:
        return page.evaluate_handle(code, [name, list(picture(1))])

    page.dispatch_event("body", "dragover", {"dataTransfer": held("a.png")})
    assert page.get_attribute("body", "class") == "over"
    page.dispatch_event("#log", "drop", {"dataTransfer": held("a.png")})
    page.wait_for_selector("#caption:has-text('a.png')")
    assert page.get_attribute("body", "class") == ""
    page.evaluate("held => dispatchEvent(new ClipboardEvent('paste', {clipboardData: held}))", held("b.png"))
    page.wait_for_selector("#caption:has-text('b.png')")
    page.dispatch_event("#log", "drop", {"dataTransfer": held("")})
    page.wait_for_selector("#error:text-is('This is no picture: choose one.')")
    assert page.told == []


def test_a_foreign_picture_is_guarded(page: Any, plain: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: Any = plain._loaded
    sound = engines._launched

    def foreign(engine: Any, state: Any, count: int) -> Any:
        found = sound(engine, state, count)
        if "foreign" in found:
            found["foreign"][:] = np.inf
        return found

    monkeypatch.setattr(engines, "_launched", foreign)
    page.route("**/v1/embeddings", lambda route: route.continue_(
        post_data=route.request.post_data.replace('"dash":{}', '"dash":{"trade_off":1e9}')))  # fmt: skip
    choose(page, given(1))
    assert page.locator("#verdict").inner_text() == "Guarded: all 5 layers ran"
    assert "Foreign to what the policy learnt from" in page.locator("#guard").inner_text()
    assert page.locator("#layers .skipped").count() == 0
    assert "Guarded: all 5 layers ran" in page.locator("#status").inner_text()


def test_names_are_text(open_page: OpenPage, serve: Callable[..., str], classes: DashRuntime) -> None:
    """Those of classes and of files."""
    page = open_page(serve(classes))
    choose(page, given(1, f"{HOSTILE}.png"))
    found = classes.encoder_with(SETTING)([picture(1)])
    assert found.probabilities is not None
    rows = page.locator("#classes tr").all_inner_texts()
    order = np.argsort(-found.probabilities[0])
    assert rows == [f"{HOSTILE} {at}\t{100 * found.probabilities[0][at]:.1f} %" for at in order]
    assert not page.is_visible("#alike")
    assert page.locator("img").count() == 0
    assert page.told == []
    own = page.url
    assert all(one.startswith(own) for one in page.asked)


def test_a_large_file_is_sent_smaller(page: Any) -> None:
    file = given(1, width=2600, height=500)
    assert len(file["buffer"]) > 3e6
    choose(page, file)
    assert "sent as 2048 × 394 pixels in JPEG" in page.locator("#caption").inner_text()
    assert page.sent[-1]["input"][0].startswith("data:image/jpeg;base64,")
    assert page.told == []


def test_errors_are_told(page: Any, tmp_path: Path) -> None:
    """Beside the picture that is shown, or in place of it where it is another one's."""
    choose(page, given(1))
    (tmp_path / "notes.txt").write_text("hello")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_selector("#error:text-is('notes.txt is no picture: choose one.')")
    assert page.is_visible("#answer")
    page.set_input_files("#file", given(2) | {"buffer": b"none"})
    page.wait_for_selector("#error:has-text('Picture 0 is no picture that can be read')")
    assert not page.is_visible("#answer")
    assert "Picture 0 is no picture" in page.locator("#status").inner_text()
    page.route("**/v1/embeddings", lambda route: route.abort())
    page.set_input_files("#file", given(3))
    page.wait_for_selector("#error:has-text('does not answer')")
    page.unroute("**/v1/embeddings")
    choose(page, given(4))
    assert not page.is_visible("#error")
    assert "Cosine with 1.png" in page.locator("#alike").inner_text()


def test_the_key_is_asked_for_where_one_is_needed(open_page: OpenPage, serve: Callable[..., str]) -> None:
    page = open_page(serve(keys=["secret"]))
    page.wait_for_selector("#key:focus")
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model option", state="attached")
    choose(page, given(1))
    assert page.locator("#verdict").inner_text() == "2 of 5 layers ran"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_axe_finds_nothing(
    open_page: OpenPage, serve: Callable[..., str], classes: DashRuntime, scheme: str, width: int
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    for runtime in ((classes,), ()):
        page = open_page(serve(*runtime), viewport={"width": width, "height": 740}, color_scheme=scheme)

        def check(where: str, page: Any = page) -> None:
            found = axe.run(page).response["violations"]
            assert not found, (where, [(one["id"], [node["html"] for node in one["nodes"]]) for one in found])
            assert page.evaluate("document.documentElement.scrollWidth") <= width

        page.wait_for_selector("#model option", state="attached")
        check("empty")
        choose(page, given(1))
        check("one picture")
        choose(page, given(2, "a-rather-long-name-without-any-place-to-break-it-" * 3 + ".png"))
        check("two pictures")
        page.get_by_role("button", name="Help").press("Enter")
        check("help")
        page.keyboard.press("Escape")
        page.set_input_files("#file", given(3) | {"mimeType": "text/plain"})
        page.wait_for_selector("#error:visible")
        check("error")


def test_its_files(serve: Callable[..., str]) -> None:
    address = serve()
    for path in FILES:
        reply = httpx.get(f"{address}/{path}")
        assert reply.status_code == 200
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert not {word for word in ("innerHTML", "http://", "https://") if word in reply.text}
