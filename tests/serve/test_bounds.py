"""Clients that would harm the server, or the answers of others."""

import json
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.cache import KVCache
from dash_export.errors import BackendError, BundleError
from dash_export.runtime.rows import NO_MEMORY, Rows
from dash_export.serve import app, running, scheduler
from dash_export.serve.http_errors import http_error
from dash_export.serve.protocol import ChatRequest
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import MISTAKE
from dash_export.text.tokenizer import Text
from tests.serve.conftest import Serve
from tests.serve.test_app import DENSE, MESSAGES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
CALL = {"function": {"name": "f"}}
NESTED = json.loads("[" * 120 + "]" * 120)


def called(said: list[Any]) -> list[dict[str, Any]]:
    return [{"function": {"name": "f", "arguments": json.dumps({"a": said})}}]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (COMPLETIONS, {"prompt": [None] * 700_000}, "prompt"),
        (COMPLETIONS, {"prompt": [[None] * 700_000]}, "prompt"),
        (CHAT, {"messages": [0] * 700_000}, "messages"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": [CALL] * 150}] * 1000}, "The body has more"),
        (CHAT, {"messages": [{"role": "user", "content": "{" * 9000, "tool_calls": [CALL] * 3000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [0] * 700_000}]}, "messages"),
        (CHAT, {"messages": MESSAGES, "stop": [0] * 700_000}, "stop"),
        (CHAT, {"messages": MESSAGES, "dash": {"skip": ["x"] * 700_000}}, "dash"),
        (CHAT, {"messages": MESSAGES, "dash": {"skip": "0-9999," * 500_000}}, "dash"),
        (CHAT, {"messages": MESSAGES, "dash": {"skip": "0-9999," * 500 + "1"}}, "'0-9999,0-9999"),
        (CHAT, {"messages": MESSAGES, "dash": {f"field{place}": 1 for place in range(200_000)}}, "dash"),
        (CHAT, {"messages": MESSAGES, "model": "tiny@skip=" + "4," * 1_000_000}, "model"),
        (COMPLETIONS, {"prompt": [NESTED] * 10_000}, "The body has more"),
        (CHAT, {"messages": MESSAGES, "tools": [{"a": '"[', "c": "\\", "b": [NESTED] * 9000}]}, "The body has more"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": called([NESTED] * 4000)}]}, "messages.0.tool_calls.0"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": called([[]] * 8000) * 4}]}, "messages: more than"),
        (COMPLETIONS, {"prompt": [1] * 500_000 + ["x"]}, "prompt"),
        (CHAT, {"messages": MESSAGES, "dash": {"x" * 3_000_000: 1}}, "dash"),
    ],
)
def test_lists_of_mistakes(path: str, body: dict[str, Any], field: str, http: httpx.Client) -> None:
    """Of which each used to cost what a thousand entries do: 15 s and 3 GB."""
    reply = http.post(path, json={"model": "tiny"} | body, timeout=5)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(field)
    assert len(reply.text) < 1000


@pytest.mark.parametrize("stream", [False, True])
def test_likelihoods_are_bounded(stream: bool, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 4,000 tokens with 20 each took 10 s of everybody's time, and 850 MB. Those of prompts count, too."""
    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 4, "n": 3, "max_tokens": 20, "stream": stream}
    echo = {"prompt": [[5] * 10, [6] * 20], "logprobs": 4, "max_tokens": 2, "echo": True, "stream": stream}
    for path, body, most, more in ((CHAT, chat, 300, 315), (COMPLETIONS, echo, 170, 180)):
        monkeypatch.setattr(running, "LIKELY", most)
        assert http.post(path, json=body).status_code == 200
        reply = http.post(path, json=body | {"max_tokens": body["max_tokens"] + 1})
        assert reply.status_code == 400
        said = f"logprobs: this request could get {more} of them, and {most} are the most. Lower max_tokens"
        assert reply.json()["error"]["message"].startswith(said)


def test_grammars_under_way_are_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may hold 24 MB while its answer waits. Those that have ended hold nothing."""
    monkeypatch.setattr(scheduler, "GUIDED", 3)
    address, body = serve(rows=1), ASKED | {"response_format": {"type": "json_object"}, "n": 2}
    for _ in range(3):
        assert httpx.post(f"{address}{CHAT}", json=body, timeout=30).status_code == 200
    refused = httpx.post(f"{address}{CHAT}", json=body | {"n": 4}, timeout=30)
    assert refused.status_code == 429
    assert "The server takes 3 answers with a grammar at a time" in refused.json()["error"]["message"]


def test_rows_have_what_memory_allows(
    tiny_runtime: Callable[..., DashRuntime], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_runtime().engines.model
    position = 8 * model.num_layers * model.num_kv_heads * model.head_dim
    monkeypatch.setattr(scheduler, "available_memory", lambda: 2 * (scheduler.PREFIX_BYTES + 4 * 300 * position))
    assert Scheduler(tiny_runtime(), rows=3).context == 300
    assert Scheduler(tiny_runtime(), rows=1).context == model.max_positions
    reply = httpx.post(f"{serve(rows=3)}{COMPLETIONS}", json={"model": "tiny", "prompt": [5] * 295, "max_tokens": 9})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert "So many for each of 3 rows: fewer leave more" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[", "host": "["}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80", "origin": "http://evil.example:80"}, 403),
        ({"origin": "https://page.example"}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "page.example", "origin": "https://page.example"}, 200),
        ({"host": "localhost:80", "origin": "http://localhost"}, 200),
        ({"host": "localhost:80", "origin": "http://localhost:81"}, 403),
        ({"host": "[::1]:1", "origin": "http://[::1]:1"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_others(headers: dict[str, str], status: int, serve: Serve) -> None:
    """A browser sends what a page asks wherever it is: without a question first, where it says it is plain text."""
    address = serve(origins=["https://page.example"], hosts=("127.0.0.1", "localhost", "::1"))
    plain = {"content-type": "text/plain"} | headers
    reply = httpx.post(f"{address}{CHAT}", content=json.dumps(ASKED), headers=plain)
    assert reply.status_code == status, reply.text
    named = headers.get("host" if headers.get("host", "").startswith("evil") else "origin", "")
    assert status == 200 or repr(named) in reply.json()["error"]["message"]
    allowed = headers.get("origin") if headers.get("origin") == "https://page.example" else None
    assert reply.headers.get("access-control-allow-origin") == allowed


def test_bodies_that_do_not_end_keep_nobody_out(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the places of those that are worked on, nor, where they are large, the memory. They have their time."""
    host, port = address.removeprefix("http://").split(":")
    monkeypatch.setattr(running, "BODY_SECONDS", 1.0)
    with ExitStack() as stack:
        for _ in range(app.ENTERING + 8):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            idle.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 500\r\n\r\n{{".encode())
        assert httpx.post(f"{address}{CHAT}", json=ASKED, timeout=20).status_code == 200
        assert b" 408 " in idle.recv(200)
    monkeypatch.setattr(running, "READING_BYTES", 1000)
    reply = httpx.post(f"{address}{CHAT}", json=ASKED | {"user": "x" * 2000}, timeout=20)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert httpx.post(f"{address}{CHAT}", json=ASKED, timeout=20).status_code == 200


def test_requests_that_are_read_at_a_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for these, as many as may wait for an answer."""
    monkeypatch.setattr(app, "ENTERING", 2)
    address = serve(rows=1, waiting=1)
    sound, go, entered = Text.chat, threading.Event(), threading.Semaphore(0)

    def slow(*arguments: Any) -> list[int]:
        entered.release()
        go.wait(20)
        return sound(*arguments)

    monkeypatch.setattr(Text, "chat", slow)
    with ThreadPoolExecutor(5) as pool:
        given = [pool.submit(httpx.post, f"{address}{CHAT}", json=ASKED, timeout=20) for _ in range(5)]
        for _ in range(2):
            entered.acquire()
        refused = next(as_completed(given)).result()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "at this moment" in refused.text
        assert not entered.acquire(timeout=0.2)
        go.set()
        assert 200 in {one.result().status_code for one in given}


def test_a_place_is_waited_for_until_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ENTERING", 1)
    address, go, entered = serve(deadline=0.5), threading.Event(), threading.Event()
    monkeypatch.setattr(Text, "chat", lambda *_: (entered.set(), go.wait(20), [1])[2])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(httpx.post, f"{address}{CHAT}", json=ASKED, timeout=20)
        entered.wait(20)
        reply = httpx.post(f"{address}{CHAT}", json=ASKED, timeout=20)
        go.set()
    assert (reply.status_code, "before the request was read" in reply.text) == (504, True)


def test_a_grammar_that_is_long_in_the_making_keeps_no_plain_chat_out(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "ENTERING", 1)
    address, go, entered, sound = serve(), threading.Event(), threading.Event(), ChatRequest.grammar

    def slow(asked: ChatRequest, tokenizer: Any) -> str | None:
        if asked.guides():
            entered.set()
            go.wait(20)
        return sound(asked, tokenizer)

    monkeypatch.setattr(ChatRequest, "grammar", slow)
    with ThreadPoolExecutor(1) as pool:
        form = {"response_format": {"type": "json_object"}}
        guided = pool.submit(httpx.post, f"{address}{CHAT}", json=ASKED | form, timeout=20)
        entered.wait(20)
        assert httpx.post(f"{address}{CHAT}", json=ASKED, timeout=10).status_code == 200
        go.set()
        assert guided.result().status_code == 200


def test_what_a_client_is_told_of_our_mistakes(caplog: pytest.LogCaptureFixture) -> None:
    """No paths: the log has them."""
    with caplog.at_level(logging.ERROR):
        for error in (BundleError("/secret/place is damaged"), BackendError("/secret/engine failed")):
            said = http_error(error)
            assert (said.status, str(said)) == (500, MISTAKE)
    assert caplog.text.count("/secret") >= 2
    assert str(http_error(BackendError(NO_MEMORY))) == NO_MEMORY, "that is for the client to know"


def test_memory_for_one_that_is_not_there(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone fails, with an answer: the others go on."""
    sound = KVCache.reserve

    def short(self: KVCache, rows: int) -> bool:
        if rows > 300 and len(self.lengths) > 1:
            raise MemoryError
        return sound(self, rows)

    monkeypatch.setattr(KVCache, "reserve", short)
    address = serve(rows=3)
    body = {"model": "tiny", "max_tokens": 60, "temperature": 0, **DENSE}
    alone = httpx.post(f"{address}{COMPLETIONS}", json=body | {"prompt": "hello"}).json()["choices"][0]["text"]
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(httpx.post, f"{address}{COMPLETIONS}", json=body | {"prompt": "hello"}) for _ in range(2)]
        reply = httpx.post(f"{address}{COMPLETIONS}", json=body | {"prompt": [5] * 320}, timeout=20)
        assert (reply.status_code, reply.json()["error"]["message"]) == (500, NO_MEMORY)
        for other in others:
            assert other.result().json()["choices"][0]["text"] == alone


def test_memory_that_a_row_grows_out_of(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone fails, in the middle of its answer."""
    address = serve(rows=3)
    body = {"model": "tiny", "max_tokens": 100, "temperature": 0, **DENSE}
    alone = httpx.post(f"{address}{COMPLETIONS}", json=body | {"prompt": "hello"}).json()["choices"][0]["text"]
    sound, began = KVCache.reserve, Rows.begin

    def short(self: KVCache, rows: int) -> None:
        if rows > 256 and len(self.lengths) > 1:
            raise MemoryError
        sound(self, rows)

    def with_room_for_a_token(rows: Rows, *given: Any) -> Any:
        return began(rows, *given[:-1], 1)

    monkeypatch.setattr(KVCache, "reserve", short)
    monkeypatch.setattr(Rows, "begin", with_room_for_a_token)
    asked = [body | {"prompt": prompt} for prompt in ("hello", [5] * 230, "hello")]
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda one: httpx.post(f"{address}{COMPLETIONS}", json=one), asked))
    assert (replies[1].status_code, replies[1].json()["error"]["message"]) == (500, NO_MEMORY)
    assert [replies[place].json()["choices"][0]["text"] for place in (0, 2)] == [alone, alone]


def test_a_body_that_does_not_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "BODY_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 500\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(200)
