"""A server on a port of its own, over the tiny bundle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest
import uvicorn

from dash_export import DashRuntime
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Scheduler


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """Its address."""
    config = uvicorn.Config(server.app, "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=2)
    socket = config.bind_socket()
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]})
    thread.start()
    address = f"http://127.0.0.1:{socket.getsockname()[1]}"
    try:
        while not server.ready:
            time.sleep(0.01)
        yield address
    finally:
        running.should_exit = True
        thread.join()


Serve = Callable[..., str]


@pytest.fixture
def serve(tiny_runtime: Callable[..., DashRuntime]) -> Iterator[Serve]:
    """`serve(rows=..., key=...)`: the address of a server of the tiny model under the name `tiny`."""
    with ExitStack() as stack:

        def make(rows: int = 3, waiting: int = 64, **options: object) -> str:
            scheduler = Scheduler(tiny_runtime(), rows=rows, waiting=waiting)
            return stack.enter_context(listening(Server({"tiny": scheduler}, drain=5.0, **options)))  # type: ignore[arg-type]

        yield make


@pytest.fixture(scope="session")
def address(tiny_runtime: Callable[..., DashRuntime]) -> Iterator[str]:
    """A server of the tiny model that all tests share: what they ask of it leaves nothing but known prompts."""
    with listening(Server({"tiny": Scheduler(tiny_runtime(), rows=3)}, drain=5.0)) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as made:
        yield made
