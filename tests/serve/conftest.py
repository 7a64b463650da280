"""A server on a port of its own, over the tiny bundle."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import openai
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundStep
from dash_export.runtime import Response
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.text_server import TextQueue, TextServer
from dash_export.serve.tickets import Request
from tests.listening import listening
from tests.tiny_texts import text_bundle

Serve = Callable[..., str]
MakeScheduler = Callable[..., Scheduler]


def slow_down(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes so much longer."""
    sound = BoundStep.decode_batch
    monkeypatch.setattr(BoundStep, "decode_batch", lambda *given: (time.sleep(seconds), sound(*given)))


def stream(scheduler: Scheduler, request: Request) -> Iterator[Response]:
    """Submit a request and yield its responses as they come. Leaving the iterator cancels the request."""
    responses: SimpleQueue[Response] = SimpleQueue()
    ticket = scheduler.submit(request, responses.put)
    try:
        while True:
            response = responses.get(timeout=60)
            if response.error is not None:
                raise response.error
            yield response
            if response.finish_reason is not None:
                return
    finally:
        scheduler.cancel(ticket)


@pytest.fixture
def serve(tiny_runtime: Callable[..., DashRuntime]) -> Iterator[Serve]:
    """`serve(rows=..., keys=...)`: the address of a server of the tiny model under the name `tiny`."""
    with ExitStack() as stack:

        def make(rows: int = 3, waiting: int = 64, **options: object) -> str:
            scheduler = Scheduler(tiny_runtime(), rows=rows, waiting=waiting)
            return stack.enter_context(listening(Server({"tiny": scheduler}, drain=5.0, **options).app))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def scheduler(runtime: DashRuntime) -> Iterator[MakeScheduler]:
    """`scheduler(...)`: one that runs, and is closed after the test."""
    made: list[Scheduler] = []

    def make(start: bool = True, **options: object) -> Scheduler:
        made.append(Scheduler(runtime, **options))  # type: ignore[arg-type]
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def address(tiny_runtime: Callable[..., DashRuntime]) -> Iterator[str]:
    """A server of the tiny model that all tests share: what they ask of it leaves nothing but known prompts."""
    with listening(Server({"tiny": Scheduler(tiny_runtime(), rows=3)}, drain=5.0).app) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as made:
        yield made


@pytest.fixture(scope="session")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def text_address(text_root: Path) -> Iterator[str]:
    """A server of the tiny text encoder under the name `tiny`."""
    queue = TextQueue(DashRuntime.load(text_root, "portable"), batch=2)
    with listening(TextServer({"tiny": queue}, drain=5.0).app) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    why = "playwright is not installed: pip install playwright"
    sync_api = pytest.importorskip("playwright.sync_api", reason=why)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def browse(browser: Any) -> Iterator[Callable[..., Any]]:
    """`browse(address, settings, **context)`: the page at an address with these settings. Its `told` is what the
    browser complained about, its `sent` are bodies of requests, its `asked` their addresses.
    """
    with ExitStack() as stack:

        def make(at: str, settings: dict[str, str], **context: Any) -> Any:
            made = browser.new_context(**context)
            stack.callback(made.close)
            page = made.new_page()
            page.set_default_timeout(60_000)  # on a busy machine
            page.told, page.sent, page.asked = [], [], []
            page.on("console", lambda line: page.told.append(line.text) if line.type == "error" else None)
            page.on("pageerror", lambda error: page.told.append(str(error)))
            page.on("request", lambda asked: page.sent.append(asked.post_data_json) if asked.post_data else None)
            page.on("request", lambda asked: page.asked.append(asked.url))
            page.add_init_script(f"localStorage['dash-export.settings'] ??= {json.dumps(json.dumps(settings))}")
            page.goto(at)
            page.bring_to_front()
            page.wait_for_function("document.hasFocus()")  # else keys are lost, on a busy machine
            return page

        yield make
