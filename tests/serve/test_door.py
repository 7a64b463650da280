"""What clients may pile up before their requests are whole."""

import gc
import json
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.responses import PlainTextResponse

from dash_export.serve import door
from dash_export.serve.door import CROWD, Heads
from dash_export.serve.running import BODY_BYTES
from tests.listening import listening

GET, CHAT = b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(autouse=True)
def short_farewells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "LINGER", 0.2)


def connected(address: str) -> socket.socket:
    url = httpx.URL(address)
    return socket.create_connection((url.host, url.port or 80), timeout=20)


def until(end: bytes, client: socket.socket) -> bytes:
    """What a client is sent until `end`, or until the connection is closed."""
    said = b""
    with suppress(ConnectionError):
        while not (end and said.endswith(end)) and (piece := client.recv(4096)):
            said += piece
    return said


def answer(client: socket.socket) -> tuple[int, str]:
    """The status and the message of the error that a client is sent, or (0, '') where the connection is closed."""
    said = until(b"", client)
    head, _, body = said.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["error"]["message"]) if said else (0, "")


def test_a_head_that_is_too_large(address: str) -> None:
    """In bytes, whole or not, or in lines. One that is as large as it may be is answered."""
    lines = b"".join(b"x%d: %s\r\n" % (line, b"y" * 600) for line in range(98))
    for head, status, said in (
        (GET + b"x: " + b"y" * door.HEAD_BYTES, 431, "more than 65536 bytes"),
        (GET + b"x: " + b"y" * 2 * door.HEAD_BYTES + b"\r\n\r\n", 431, "more than 65536 bytes"),
        (b"GET /" + b"y" * 2 * door.HEAD_BYTES, 431, "more than 65536 bytes"),
        (GET + b"x: y\r\n" * 100 + b"\r\n", 431, "more than 100 headers"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "no request of HTTP/1.1"),
    ):
        with connected(address) as client:
            with suppress(ConnectionError):
                client.sendall(head)
            found = answer(client)
        assert (found[0], said in found[1]) == (status, True), found
    with connected(address) as client:
        client.sendall(GET + lines + b"Connection: close\r\n\r\n")
        assert b"200 OK" in client.recv(4096)


def test_a_head_that_does_not_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it comes, on a new connection or on one that has had an answer."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.5)
    for before in (b"", GET + b"\r\n"):
        with connected(address) as client:
            client.sendall(before)
            if before:
                assert b"200 OK" in until(b'{"status":"ok"}', client)
            began = time.monotonic()
            for letter in GET * 100:
                with suppress(ConnectionError):
                    client.sendall(bytes([letter]))
                client.settimeout(0.02)
                with suppress(TimeoutError):
                    said = client.recv(4096)
                    break
            client.settimeout(10)
            assert b" 408 " in said + until(b"", client)
            assert time.monotonic() - began < 5


@contextmanager
def slow_answers(seconds: float) -> Iterator[str]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await door.asyncio.sleep(seconds)
            await PlainTextResponse("done")(scope, receive, send)

    with listening(app) as found:
        yield found


def test_an_answer_is_not_cut_by_what_comes_after_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.3)
    with slow_answers(0.7) as address, ExitStack() as stack:
        clients = [stack.enter_context(connected(address)) for _ in range(3)]
        for client, sent in zip(clients, (b"", b"\r\n", b"GET /"), strict=True):
            client.sendall(GET + b"\r\n" + sent)
        assert all(until(b"done", client).endswith(b"done") for client in clients)


def test_requests_that_do_not_wait_for_answers() -> None:
    """They would be kept, at 7 kB each: the connection is closed, and its answer with it."""
    with slow_answers(0.2) as address:
        with connected(address) as client:
            client.sendall((GET + b"\r\n") * 2)
            assert answer(client) == (0, "")
        with connected(address) as client:
            for _ in range(3):  # one after the other as always
                client.sendall(GET + b"\r\n")
                assert until(b"done", client).endswith(b"done")


def test_a_body_that_is_too_large_is_refused_at_once(address: str) -> None:
    """By its length, before any of it comes. Then nothing more is read."""
    with connected(address) as client:
        client.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % (BODY_BYTES + 1))
        began = time.monotonic()
        assert answer(client)[0] == 413
        assert time.monotonic() - began < 5


def test_what_is_sent_after_an_answer_is_not_read(address: str) -> None:
    """An answer which came before its request was whole ends the connection, and can be read."""
    with connected(address) as client:
        client.sendall(GET + b"Content-Length: 99999999999\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
        sent = 0
        with suppress(ConnectionError):
            while sent < 1 << 30:
                sent += client.send(b"x" * (1 << 20))
        assert sent < 1 << 28


def test_an_answer_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not held for good, nor is its connection. Who reads slowly gets all of it."""
    monkeypatch.setattr(door, "TAKE_SECONDS", 0.5)
    size = 16 << 20

    def taken(more: bytes, pause: float, each: int) -> int:
        with connected(address) as client:
            client.sendall(GET + more + b"\r\n")
            time.sleep(pause)
            got = 0
            with suppress(ConnectionError):
                while got < size and (piece := client.recv(1 << 16)):
                    got += len(piece)
                    if each and got % each < len(piece):
                        time.sleep(pause)
            return got

    with listening(PlainTextResponse("x" * size)) as address, ThreadPoolExecutor(4) as pool:
        ways = [(more, *how) for more in (b"", b"Connection: close\r\n") for how in ((1.5, 0), (0.1, 2 << 20))]
        found = [*pool.map(taken, *zip(*ways, strict=True))]
    assert [got >= size for got in found] == [False, True] * 2, found


def test_small_answers_do_not_wait_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kept connection costs 40 ms a request (listeners of `socket.create_server`, as `serve` has them)."""
    delayed, made = list[bool](), door.Door.connection_made

    def seen(self: door.Door, transport: Any) -> None:
        made(self, transport)
        connection = transport.get_extra_info("socket")
        delayed.append(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(door.Door, "connection_made", seen)
    with listening(PlainTextResponse("done")) as address:
        assert httpx.get(address).text == "done"
    assert delayed == [False]


def test_connections_of_an_address() -> None:
    with listening(PlainTextResponse("done"), most=3) as address, ExitStack() as stack:
        url = httpx.URL(address)
        for _ in range(3):
            stack.enter_context(connected(address))
        assert "More than 3 connections" in httpx.get(address).json()["error"]["message"]
        assert httpx.get(address).status_code == 429
        other = socket.create_connection((url.host, url.port or 80), timeout=20, source_address=("127.0.0.2", 0))
        with stack.enter_context(other):
            other.sendall(GET + b"\r\n")
            assert b"200 OK" in other.recv(4096)
        stack.close()
        latest = time.monotonic() + 10
        while httpx.get(address).status_code != 200:
            assert time.monotonic() < latest


def test_heads_of_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many hold large ones, more of these are refused, and what is small is taken."""
    monkeypatch.setattr(door, "HELD_BYTES", 100_000)
    with listening(PlainTextResponse("done")) as address, ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(connected(address))
            client.sendall(GET + b"x: " + b"y" * 49_000)
        time.sleep(0.2)
        client.sendall(b"y" * 5000)
        assert answer(client)[0] == 429
        assert httpx.get(address).status_code == 200
        stack.close()
        with connected(address) as client:
            client.sendall(GET + b"x: " + b"y" * 49_000 + b"\r\n\r\n")
            assert b"200 OK" in client.recv(4096)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    paths[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return paths


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same limits, and for the handshake, too."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 1.0)
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(cafile=str(cert))
    with listening(PlainTextResponse("done" * (4 << 20)), certificate=cert, key=key) as plain:
        port = httpx.URL(plain).port
        assert len(httpx.get(f"https://localhost:{port}", verify=context).content) == 16 << 20
        with connected(plain) as client:
            began = time.monotonic()
            assert not client.recv(100), "a handshake that does not begin"
            assert time.monotonic() - began < 10
        for sent, said in ((GET + b"x: y\r\n" * 101, "more than 100"), (GET, "not there after 1 s")):
            with context.wrap_socket(connected(plain), server_hostname="localhost") as client:
                client.sendall(sent)
                assert said in answer(client)[1]


def test_logging_of_the_program_around_it_is_left_alone() -> None:
    """A handler that is closed may close the program's stderr, as absl's does."""
    closed = Mock()
    handler = logging.StreamHandler()
    handler.close = closed  # type: ignore[method-assign]
    with listening(PlainTextResponse("done")) as address:
        assert httpx.get(address).text == "done"
    closed.assert_not_called()


def test_a_crowd_is_left_out_of_collections() -> None:
    heads = Heads()
    try:
        gc.unfreeze()
        for _ in range(CROWD - 1):
            heads.enter("10.0.0.1")
        assert gc.get_freeze_count() == 0
        heads.enter("10.0.0.1")
        assert gc.get_freeze_count() > 0
        heads.leave("10.0.0.1")
        assert gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()
