"""The way in: uvicorn, with limits to what a client may send before its request is whole.

httptools and uvicorn bound neither the bytes nor the number of a request's headers, nor the time that they take. h11
bounds the bytes, but parses in Python: one connection can keep it busy for seconds. So this is httptools, with limits.
"""

import asyncio
import gc
import json
import socket
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dash_export.serve.http_errors import HttpError

HEAD_BYTES, HEADERS, HEAD_SECONDS = 1 << 16, 100, 10.0
"""Most bytes, lines and seconds of a request's head; as many bytes for lines of chunks, and trailers, after it."""
HELD_BYTES, SMALL_BYTES = 32 << 20, 1 << 12
"""Most bytes of all unfinished heads together. Those up to SMALL_BYTES are taken even then."""
READ_BYTES, LINGER = 1 << 14, 1.0
"""Bytes read from a connection at a time; seconds that a client has to read an answer to a request cut short."""
TAKE_SECONDS = 60.0
"""Seconds after which a client that takes nothing of its answer is given up: asyncio would hold it for good."""


CROWD = 500
"""Connections from which on Python's collector leaves out what is alive: with 10,000 it stops all for 0.3 s a time."""


class Heads:
    """State that all connections share: how many each address has, and the bytes of heads that are not whole."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: connections that an address may have."""
        self.most, self.connections, self.held = most, Counter[str](), 0
        self._total = 0

    def enter(self, address: str) -> bool:
        """Count a connection; return whether its address has too many."""
        self.connections[address] += 1
        self._total += 1
        if self._total % CROWD == 0:
            gc.freeze()
        return self.most is not None and self.connections[address] > self.most

    def leave(self, address: str) -> None:
        self.connections[address] -= 1
        if not self.connections[address]:
            del self.connections[address]
        self._total -= 1
        if self._total == CROWD - 1:
            gc.unfreeze()


class Door(HttpToolsProtocol):
    """Connection of a client. What goes beyond a limit is answered, and the connection closed."""

    def __init__(self, *given: Any, heads: Heads, **named: Any) -> None:
        super().__init__(*given, **named)
        self._heads, self._size = heads, 0
        self._in_body = self._leaving = False
        self._error: HttpError | None = None
        self._late: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # asyncio's transport reads so much at a time
        if connection := transport.get_extra_info("socket"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * TAKE_SECONDS))
            # asyncio sets it for sockets that were made with IPPROTO_TCP alone. Without it each answer on a kept
            # connection, and each token of a stream, can wait 40 ms for the client's acknowledgement of the one before.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._address = self.client[0] if self.client else ""
        if self._heads.enter(self._address):
            self._refuse(HttpError(429, f"More than {self._heads.most} connections of one address: close some."))
            self.transport.close()  # at once: it must not count for longer
        else:
            self._late = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._hold(0)
        self._stop_waiting()
        self._heads.leave(self._address)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        if self._late is None and not self._in_body and not self._answering:
            self._late = self.loop.call_later(HEAD_SECONDS, self._too_late)
        self._hold(self._size + len(data))
        super().data_received(data)
        if self._size > HEAD_BYTES:
            self._refuse(HttpError(431, f"The headers have more than {HEAD_BYTES} bytes."))
        elif self._size > SMALL_BYTES and self._heads.held > HELD_BYTES:
            self._refuse(HttpError(429, "Too much is sent at this moment: ask again later."))

    def _hold(self, size: int) -> None:
        self._heads.held += size - self._size
        self._size = size

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._refuse(HttpError(408, f"The headers were not there after {HEAD_SECONDS:g} s."))

    def _refuse(self, error: HttpError) -> None:
        self._error = self._error or error
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer with the error that was found, or as to what is no HTTP, and close. An answer that is under way is
        not written into.
        """
        if self._answering:
            self.transport.close()
        elif not self._leaving and not self.transport.is_closing():
            error = self._error or HttpError(400, "This is no request of HTTP/1.1.")
            body = json.dumps(error.record()).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
            self._leave()

    def _leave(self) -> None:
        """Read nothing more, and close when the client has had time to read: closing at once may lose the answer."""
        self._leaving = True
        self._stop_waiting()
        self.flow.pause_reading()
        self.loop.call_later(LINGER, self.transport.close)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > HEADERS:
            self._error = HttpError(431, f"The request has more than {HEADERS} headers.")
            raise self._error

    def on_headers_complete(self) -> None:
        if self._answering:
            raise HttpError(400, "The next request came before the answer to the last.")
        self._hold(0)
        self._stop_waiting()
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._hold(0)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._hold(0)
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._leave()  # nobody wants the rest


class Loop(asyncio.SelectorEventLoop):
    """asyncio's event loop, where a client's TLS handshake may take HEAD_SECONDS, too."""

    async def create_server(self, *given: Any, **named: Any) -> asyncio.Server:
        seconds = HEAD_SECONDS if named.get("ssl") else None
        SSLProtocol.max_size = READ_BYTES  # type: ignore[attr-defined]  # the buffer of each connection, else 256 kB
        return await super().create_server(*given, ssl_handshake_timeout=seconds, **named)


class HttpServer(uvicorn.Server):
    """Server of an ASGI application, with these limits; `run` takes the socket that it listens to."""

    def __init__(
        self,
        app: Any,
        most: int | None = None,
        drain: float = 0.0,
        draining: Callable[[], None] = lambda: None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """`most`: connections that an address may have. `drain`: seconds that answers have to end; `draining` is called
        when they begin. `certificate`, `key`: for TLS, PEM. Raises OSError and SSLError for those of no use.
        """
        config = uvicorn.Config(
            app,
            http=partial(Door, heads=Heads(most)),  # type: ignore[arg-type]
            ws="none",
            loop=f"{__name__}:Loop",
            log_config=None,  # its own would close the handlers of the program that embeds this
            log_level="error",
            timeout_graceful_shutdown=int(drain + 5),
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        config.load()
        super().__init__(config)
        self._draining = draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._draining()
        super().handle_exit(sig, frame)
