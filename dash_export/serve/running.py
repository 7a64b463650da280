"""Steps of every request: read the body, submit its answers, collect them or stream them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dash_export.core.kinds import Setting
from dash_export.core.sampling import Sampling, TokenIds
from dash_export.errors import DashError, RequestError
from dash_export.runtime.results import Response as Token
from dash_export.serve.answers import Answer, Inbox
from dash_export.serve.http_errors import HttpError, wrong_field
from dash_export.serve.messages import check_parts
from dash_export.serve.protocol import ChatRequest, Generation, model_and_setting
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import GUIDED, Reading, Request
from dash_export.text.guidance import Guide

if TYPE_CHECKING:
    from dash_export.serve.app import Endpoint, Server

BODY_BYTES, BODY_SECONDS = 4 << 20, 10.0
READING_BYTES = 128 << 20
"""Most bytes of all bodies that are being read, or wait to be parsed."""
LIKELY = 100_000
"""Most logprobs of all answers to a request: 4,096 tokens with the 20 most likely ones of each make 86,016."""
LONG_BYTES = 1 << 16
"""Bodies larger than this have their prompts encoded by a single thread, so that long prompts wait for each other."""
_Asked = TypeVar("_Asked", bound=BaseModel)
_T = TypeVar("_T")


class RunningAnswers:
    """The answers to one request, and the fields that all objects about them share (`common`)."""

    def __init__(self, name: str, scheduler: Scheduler, answers: list[Answer], inbox: Inbox, asked: Generation) -> None:
        self.scheduler, self.answers, self.inbox, self.asked = scheduler, answers, inbox, asked
        self._pieces = dict[int, str]()
        self.common = {"id": f"dash-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def close(self) -> None:
        """Cancel what is left of all answers."""
        self.inbox.drain()  # tokens that nobody waits for count, too
        for answer in self.answers:
            answer.close()

    def skips(self, token: Token) -> dict[str, Any]:
        """Return the layers that a streamed token skipped, if the request asks for them."""
        if not self.asked.dash.skips:
            return {}
        return {"dash": {"skipped_layers": token.actions.nonzero()[0].tolist(), "layers": len(token.actions)}}

    def logprobs(self, token: Token) -> list[dict[str, Any]]:
        """Return the chosen token, then the most likely ones, as chat completions list them. Return nothing for a token
        that ends a chat's turn: it is no part of the answer.
        """
        text = self.scheduler.runtime.text
        if token.token in text.eos_ids and self.asked.operation == "chat":
            return []
        return self.listed(token.logprobs)

    def listed(self, logprobs: Sequence[tuple[int, float | None]]) -> list[dict[str, Any]]:
        """Return tokens and their log-likelihoods as chat completions list them."""
        text, found = self.scheduler.runtime.text, []
        for one, logprob in logprobs:
            if one not in self._pieces:
                first = text.encode("a", special=False)[-1:]  # SentencePiece's decoders drop the space of a first token
                before, both = (text.tokenizer.decode(ids, skip_special_tokens=False) for ids in (first, [*first, one]))
                self._pieces[one] = both.removeprefix(before)
            piece = self._pieces[one]
            whole = "\N{REPLACEMENT CHARACTER}" not in piece  # else it is part of a character
            found.append({"token": piece, "logprob": logprob, "bytes": list(piece.encode()) if whole else None})
        return found

    def likelihoods(self, answer: Answer, tokens: list[Token]) -> list[list[dict[str, Any]]]:
        """Return the logprobs of a whole answer's tokens, without those of a stop string, which is no part of it."""
        text, ids = self.scheduler.runtime.text, [token.token for token in tokens]
        stopped, ticket = self.asked.stop and answer.finish_reason == "stop", answer.ticket
        before = [int(ticket.ids[-1])] if ticket.request.continues else []  # as `Turn`: a first space stays
        most = len(text.decode(before)) + len(answer.text)
        while stopped and ids and len(text.decode([*before, *ids[:-1]])) >= most:
            ids.pop()
        return [self.logprobs(token) for token in tokens[: len(ids)]]

    def prompt(self, answer: Answer) -> list[list[dict[str, Any]]]:
        """Return the logprobs of a prompt's tokens, where they were read. Nothing says how likely the first one is."""
        return [self.listed([(int(answer.ticket.ids[0]), None)]), *map(self.listed, answer.ticket.likely)]


class Arrival(NamedTuple):
    """A request whose body has been read: its bytes, when that was, in seconds of `time.perf_counter`, and the function
    that gives its place back (`Server.entering`).
    """

    size: int
    began: float
    leave: Callable[[], None]


def left(server: Endpoint[Any], arrival: Arrival) -> float | None:
    """Return the seconds that a request has left, None where there is no deadline."""
    return None if server.deadline is None else server.deadline - (time.perf_counter() - arrival.began)


async def in_thread(server: Endpoint[Any], arrival: Arrival, work: Callable[[], _T], guided: bool = False) -> _T:
    """Return `work()`, done in a thread: one for all long bodies, and one for all grammars."""
    threads = server.long if arrival.size > LONG_BYTES else server.guided if guided else None
    if threads is not None:
        arrival.leave()  # it waits for others of its kind, which must not keep everybody waiting
    return await asyncio.get_running_loop().run_in_executor(threads, work)


async def begin(
    server: Server,
    asked: Generation,
    encode: Callable[[Scheduler], Sequence[TokenIds]],
    max_tokens: int | None,
    logprobs: int | None,
    arrival: Arrival,
    reading: Reading | None = None,
) -> RunningAnswers:
    """Submit the `n` answers to each prompt, all or none. `encode` makes the token ids, in a thread; how long that may
    take is told by its size. Raises HttpError and DashError.
    """
    base, setting = model_and_setting(asked.model, asked.dash)
    name, scheduler = server.scheduler(base)
    sampling = asked.sampling(logprobs)
    guides: list[Guide | None] = [None] * (asked.prompts * (asked.n or 1))
    if asked.prompts > 1 and len(guides) > scheduler.most_waiting:
        raise RequestError(f"prompt: {len(guides)} answers at once, and the queue takes {scheduler.most_waiting}.")
    if asked.guides() and len(guides) > GUIDED:
        raise RequestError(f"{len(guides)} answers of a form at once: {GUIDED} are the most.")
    if reading is not None and setting not in (None, Setting("dense")):
        raise RequestError("echo: a prompt is dense, whatever its answer skips: leave out how much is skipped.")
    if max(sampling.logit_bias, default=0) >= (vocab := scheduler.runtime.engines.model.vocab_size):
        raise RequestError(f"logit_bias: this model has the tokens 0 to {vocab - 1}.")
    scheduler.check_queue()

    def prepare() -> tuple[Sequence[TokenIds], Sampling]:
        found = replace(sampling, grammar=asked.grammar(scheduler.runtime.text.tokenizer))
        if found.grammar is not None:
            scheduler.check_queue(len(guides))
            guides[:] = scheduler.runtime.text.guides.guides(found.grammar, len(guides))
        return encode(scheduler), found

    ids, sampling = await in_thread(server, arrival, prepare, bool(asked.guides()))
    deadline = left(server, arrival)
    if logprobs is not None:
        each = (logprobs + 1) * len(guides)
        if max_tokens is None:
            max_tokens = max(1, min(LIKELY // each, scheduler.context - max(map(len, ids))))
        told = each * max_tokens
        if reading is not None:
            told += (logprobs + 1) * (asked.n or 1) * sum(map(len, ids))
        if told > LIKELY:
            raise RequestError(
                f"logprobs: this request could get {told} of them, and {LIKELY} are the most. Lower max_tokens, or the "
                "number of likely tokens beside each."
            )
    requests = list[Request]()
    for place in range(len(guides)):
        prompt, choice = divmod(place, asked.n or 1)
        own = replace(sampling, seed=None if sampling.seed is None else sampling.seed + choice)
        requests.append(Request(ids[prompt], max_tokens, own, setting, deadline, asked.continues, reading))
    inbox, ended = Inbox(bool(asked.stream)), partial(server.metrics.answered, asked.operation, name)
    answers = submitted(scheduler, requests, guides, inbox, ended, arrival.began)
    return RunningAnswers(name, scheduler, answers, inbox, asked)


def submitted(
    scheduler: Scheduler,
    requests: Sequence[Request],
    guides: list[Guide | None],
    inbox: Inbox,
    ended: Callable[[Answer], None],
    began: float,
) -> list[Answer]:
    """Submit requests, each with its guide, all or none. Raises DashError."""
    answers = list[Answer]()
    try:
        for request, guide in zip(requests, guides, strict=True):
            answers.append(Answer(scheduler, request, inbox, guide, ended, began))
        guides.clear()
    except DashError:
        for answer in answers:
            scheduler.cancel(answer.ticket)
        raise
    return answers


async def begin_chat(server: Server, request: ChatRequest, arrival: Arrival) -> RunningAnswers:
    """Submit the answers to a chat, by `begin`. Raises HttpError and DashError."""

    def encode(scheduler: Scheduler) -> list[TokenIds]:
        return [np.array(chat_ids(request, scheduler))]

    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return await begin(server, request, encode, request.most_tokens, logprobs, arrival)


def chat_ids(request: ChatRequest, scheduler: Scheduler) -> list[int]:
    """Return the token ids of a chat, slowly for a long one. Raises RequestError and ContextLengthError."""
    messages, tools = [message.plain() for message in request.messages], request.given_tools()
    begins = request.add_generation_prompt is not False
    text = scheduler.runtime.text
    return text.chat(messages, scheduler.context, tools, begins, request.continue_final_message)


class AnswerStream(StreamingResponse):
    """Server-sent events of one request. Its answers are closed however the response ends: a client may disconnect
    before the first event is asked for.
    """

    def __init__(self, answers: RunningAnswers, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


def event(value: Mapping[str, Any]) -> str:
    """Return a server-sent event in ASCII, because some clients end a line at U+2028."""
    return f"data: {json.dumps(value)}\n\n"


async def answer_tokens(running: RunningAnswers) -> AsyncIterator[list[tuple[int, Token]]]:
    """Yield (index of the answer, token) of all answers, those at once that came since the last were yielded. Raises
    the error of an answer that fails.
    """
    left = len(running.answers)
    while left:
        tokens, error = list[tuple[int, Token]](), None
        for answer, token in await running.inbox.get():
            error = error or token.error
            left -= token.finish_reason is not None
            if token.error is None:
                tokens.append((running.answers.index(answer), token))
        if tokens:
            yield tokens
        if error is not None:
            raise error


async def collected_tokens(running: RunningAnswers, http: HttpRequest) -> list[list[Token]]:
    """Return the tokens of each answer. If the client disconnects, cancel all answers and raise ClientDisconnect."""
    found: list[list[Token]] = [[] for _ in running.answers]

    async def gather() -> None:
        async for tokens in answer_tokens(running):
            for index, token in tokens:
                found[index].append(token)

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(gather()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        work.result()
    finally:
        work.cancel()
        leaving.cancel()
        running.close()
    return found


@asynccontextmanager
async def parsed_request(
    server: Endpoint[Any], kind: type[_Asked], http: HttpRequest
) -> AsyncIterator[tuple[_Asked, Arrival]]:
    """Read the body; yield it as `kind`, and what arrival. The request counts as one that is entering until the block
    ends. Raises HttpError, which names the wrong field.
    """
    body = bytearray()
    try:
        try:
            await asyncio.wait_for(_read(server, http, body), BODY_SECONDS)
        except asyncio.TimeoutError:  # not the built-in one in Python 3.10
            raise HttpError(408, f"The body was not there after {BODY_SECONDS:g} s.") from None
        began = time.perf_counter()
        async with server.entering() as leave:
            check_parts(body)
            try:
                asked = kind.model_validate_json(body)
            except ValidationError as error:
                raise wrong_field(error, body) from None
            yield asked, Arrival(len(body), began, leave)
    finally:
        server.reading -= len(body)


async def _read(server: Endpoint[Any], http: HttpRequest, body: bytearray) -> None:
    large = HttpError(413, f"The body has more than {BODY_BYTES} bytes.")
    if int(http.headers.get("content-length", 0)) > BODY_BYTES:
        raise large
    async for piece in http.stream():
        body += piece
        server.reading += len(piece)
        if len(body) > BODY_BYTES:
            raise large
        if server.reading > READING_BYTES:
            raise HttpError(429, "Too much is sent at this moment: ask again later.")
