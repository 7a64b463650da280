"""The endpoint: OpenAI's API over the queues of one or several bundles, as an ASGI application. `Server` is that of
causal LMs; those of encoders are in picture_server.py and text_server.py.

The fields that are read are in protocol.py and responses.py. Errors have OpenAI's form and our wording.
"""

import asyncio
import contextlib
import hmac
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dash_export.errors import DashError
from dash_export.serve.http_errors import HttpError, http_error
from dash_export.serve.metrics import Metrics
from dash_export.serve.openapi import POSTS, Posts, document
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import DeadlineError, Queue
from dash_export.serve.tokens import tokenizer_info

PAGE_PARTS = {"/page.css": "page.css", "/parts.js": "parts.js"}
"""Files that the pages share."""
_PORTS = {"http": 80, "https": 443}
_PROMPTS = {"/v1/completions": "prompt", "/v1/responses": "input", "/v1/embeddings": "input"}
ENTERING = 32
"""Most requests that are parsed and encoded at a time; others wait for it."""
Handler = Callable[[Any, HttpRequest], Coroutine[Any, Any, Response]]
_Queue = TypeVar("_Queue", bound=Queue)


class Endpoint(Generic[_Queue]):
    """Server of one or more bundles. `app`: the ASGI application; `deadline`: seconds per request, queue included. Who
    inherits says what is asked of it.
    """

    posts: ClassVar[Posts]
    """What is asked of it."""
    page: ClassVar[Mapping[str, str]] = {}
    """Path -> file of the page to try it."""

    def __init__(
        self,
        served: Mapping[str, _Queue],
        *,
        keys: Collection[str] = (),
        origins: Sequence[str] = (),
        hosts: Collection[str] | None = None,
        deadline: float | None = None,
        drain: float = 30.0,
    ) -> None:
        """Build `app`. `served`: queues by model name. `keys`: API keys, one of which a request must send, or none.
        `origins`: web pages that may send requests. `hosts`: names that this server answers to, by default all.
        `drain`: seconds that answers have to end when the server stops.
        """
        self._origins, self._entering, self.reading = frozenset(origins), 0, 0
        self._places = asyncio.Semaphore(ENTERING)
        self._hosts = None if hosts is None else {*hosts, *(urlsplit(one).hostname for one in origins)}
        self.long, self.guided = (ThreadPoolExecutor(1, name) for name in ("long-prompts", "grammars"))
        self._keys = [key.encode() for key in keys]
        self.served, self.deadline, self._drain = dict(served), deadline, drain
        self.metrics = Metrics(self.served)
        self._began = int(time.time())
        cors = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
        routes = [
            *(Route(path, self._keyed(post[0]), methods=["POST"]) for path, post in self.posts.items()),
            *(Route(path, self._open(_page_file(name)), name="page") for path, name in self.page.items()),
            *self._routes(),
            Route("/health", self._open(_health)),
            Route("/metrics", self._open(_metrics)),
            Route("/openapi.json", self._open(_openapi)),
            Route("/v1/models", self._keyed(_models)),
            Route("/v1/models/{name:path}", self._keyed(_model)),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=cors if origins else [],
            lifespan=self._lifespan,
            exception_handlers={404: _not_found, 405: _not_found},
        )
        self.app.router.redirect_slashes = False

    def _routes(self) -> list[Route]:
        """Return the routes that are of a kind of models."""
        return []

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        for scheduler in self.served.values():
            scheduler.start()
        yield
        await asyncio.gather(*(asyncio.to_thread(one.close, self._drain) for one in self.served.values()))

    def _open(self, handler: Handler) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        async def answered(http: HttpRequest) -> Response:
            try:
                self._check_origin(http)
                return await handler(self, http)
            except HttpError as error:
                return _error(error)
            except DashError as error:
                return _error(http_error(error, _PROMPTS.get(http.url.path, "messages")))
            except ClientDisconnect:
                return Response(status_code=499)

        return answered

    def _keyed(self, handler: Handler) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        async def checked(server: Any, http: HttpRequest) -> Response:
            scheme, _, key = http.headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # as it was sent
            if self._keys and not any(hmac.compare_digest(given, one) for one in self._keys):
                said = "The API key is missing or wrong: Authorization: Bearer KEY."
                raise HttpError(401, said, None, "invalid_api_key")
            return await handler(server, http)

        return self._open(checked)

    def _check_origin(self, http: HttpRequest) -> None:
        """Raise HttpError for a web page of somebody else: one whose Origin is not allowed, or one that reaches this
        server by a foreign host name, which it has pointed at this machine's address (DNS rebinding).
        """
        host, origin = http.headers.get("host", ""), http.headers.get("origin")
        with contextlib.suppress(ValueError):
            asks, own = urlsplit(origin or ""), urlsplit(f"//{host}")
            usual = _PORTS.get(asks.scheme)
            same = (asks.hostname, asks.port or usual) == (own.hostname, own.port or usual)
            if self._hosts is not None and own.hostname not in self._hosts:
                known = ", ".join(sorted(filter(None, self._hosts)))
                raise HttpError(403, f"This server does not go by the name of {host!r:.100}, only by {known}. Where a "
                                "proxy or a web page reaches it by that name: serve --cors https://NAME.")  # fmt: skip
            if origin is None or {origin, "*"} & self._origins or (same and asks.hostname):
                return
        raise HttpError(403, f"Pages of {origin or host!r:.100} may not ask this server: serve --cors ORIGIN.")

    @contextlib.asynccontextmanager
    async def entering(self) -> AsyncIterator[Callable[[], None]]:
        """Hold one of ENTERING places while a request is parsed and its prompt is made: more at a time would need too
        much memory and too much work of the chat templates. Yield a function that gives the place back before. Raises
        HttpError where more wait than all queues take, and DeadlineError.
        """
        if self._entering >= ENTERING + sum(one.size + one.most_waiting for one in self.served.values()):
            raise HttpError(429, "Too many requests at this moment: ask again later.")
        self._entering += 1
        try:
            try:
                await asyncio.wait_for(self._places.acquire(), self.deadline)
            except asyncio.TimeoutError:  # not the built-in one in Python 3.10
                raise DeadlineError("The deadline passed before the request was read.") from None
            with contextlib.ExitStack() as place:
                place.callback(self._places.release)
                yield place.close
        finally:
            self._entering -= 1

    @cached_property
    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return document(self.served, bool(self._keys), self.posts)

    def drain(self) -> None:
        """Take no more requests, and let answers end for `drain` seconds, then fail them. Does not wait for that."""
        for scheduler in self.served.values():
            threading.Thread(target=scheduler.close, args=(self._drain,), daemon=True).start()

    def record(self, name: str) -> dict[str, Any]:
        """Return a model as OpenAI's API has it."""
        return {"id": name, "object": "model", "created": self._began, "owned_by": "dash-export"}

    def scheduler(self, name: str) -> tuple[str, _Queue]:
        """Return the name and queue of a model. An empty name means the only one. Raises HttpError."""
        if not name and len(self.served) == 1:
            return next(iter(self.served.items()))
        if name not in self.served:
            raise HttpError(404, f"There is no model {name!r:.100} here. Known: {', '.join(self.served)}.", "model",
                            "model_not_found")  # fmt: skip
        return name, self.served[name]


class Server(Endpoint[Scheduler]):
    """Server of causal LMs."""

    posts: ClassVar[Posts] = POSTS
    page: ClassVar[Mapping[str, str]] = {"/": "page.html", "/page.js": "page.js", **PAGE_PARTS}

    def _routes(self) -> list[Route]:
        return [Route("/tokenizer_info", self._keyed(tokenizer_info))]


def _page_file(name: str) -> Handler:
    """Return what sends a file of the page. The page loads nothing from elsewhere, and no script but its own runs."""
    policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}  # no-cache: ask each time

    async def send(_server: Any, _http: HttpRequest) -> Response:
        return FileResponse(Path(__file__).with_name(name), headers=headers)

    return send


async def _health(server: Endpoint[Any], _: HttpRequest) -> Response:
    ready = all(scheduler.alive for scheduler in server.served.values())
    return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)


async def _metrics(server: Endpoint[Any], _: HttpRequest) -> Response:
    return PlainTextResponse(server.metrics.exposition(), media_type="text/plain; version=0.0.4")


async def _openapi(server: Endpoint[Any], _: HttpRequest) -> Response:
    return JSONResponse(server.document)


async def _models(server: Endpoint[Any], _: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [server.record(name) for name in server.served]})


async def _model(server: Endpoint[Any], http: HttpRequest) -> Response:
    name = http.path_params["name"]
    server.scheduler(name or "/")  # raises where there is none
    return JSONResponse(server.record(name))


def _error(error: HttpError) -> JSONResponse:
    return JSONResponse(error.record(), error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "is not there" if status == 404 else f"does not take {http.method}"
    known = [path for route in http.app.routes if "{" not in (path := route.path) and route.name != "page"]
    return _error(HttpError(status, f"{http.url.path:.100} {what}. Known: {', '.join(known)}."))
