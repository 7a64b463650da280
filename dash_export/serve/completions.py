"""Chat and plain completions: a request's answers, whole or as server-sent events, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from dash_export.errors import DashError
from dash_export.runtime.results import Response as Token
from dash_export.runtime.results import TokenIds
from dash_export.serve.answers import Answer
from dash_export.serve.protocol import ChatRequest, CompletionRequest, Generation, HttpError, model_and_setting, told
from dash_export.serve.scheduler import Request, Scheduler
from dash_export.serve.tools import Words, split_calls

if TYPE_CHECKING:
    from dash_export.serve.app import Server

BODY_BYTES, BODY_SECONDS = 4 << 20, 10.0
_FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}
_Asked = TypeVar("_Asked", bound=BaseModel)


class Begun:
    """Answers on their way, and what every object that tells of them has in common."""

    def __init__(self, name: str, scheduler: Scheduler, answers: list[Answer], asked: Generation) -> None:
        self.scheduler, self.answers, self.asked = scheduler, answers, asked
        self.common = {"id": f"dash-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def usage(self) -> dict[str, Any]:
        """Sum the usage of all answers; the prompt counts once."""
        first, *others = (answer.usage() for answer in self.answers)
        for other in others:
            first["completion_tokens"] += other["completion_tokens"]
        first["total_tokens"] = first["prompt_tokens"] + first["completion_tokens"]
        return first

    def skips(self, token: Token) -> dict[str, Any]:
        """The layers that a streamed token skipped, where that was asked for."""
        if not self.asked.dash.skips:
            return {}
        return {"dash": {"skipped_layers": token.actions.nonzero()[0].tolist(), "layers": len(token.actions)}}

    def logprobs(self, token: Token) -> list[dict[str, Any]]:
        """The chosen token, then the most likely ones, as chat completions tell them."""
        text = self.scheduler.runtime.text
        found = []
        for one, logprob in token.logprobs:
            piece = text.tokenizer.decode([one], skip_special_tokens=False)
            whole = "\N{REPLACEMENT CHARACTER}" not in piece  # else it is a part of a letter
            found.append({"token": piece, "logprob": logprob, "bytes": list(piece.encode()) if whole else None})
        return found


async def begin(
    server: Server,
    asked: Generation,
    encode: Callable[[Scheduler], TokenIds],
    max_tokens: int | None,
    logprobs: int | None,
) -> Begun:
    """Submit the `n` answers to one prompt, all or none. `encode` may take its time. Raises HttpError and DashError."""
    base, setting = model_and_setting(asked.model, asked.dash)
    name, scheduler = server.scheduler(base)
    samplings = [asked.sampling(place, logprobs) for place in range(asked.n)]

    def prepare() -> TokenIds:
        for sampling in samplings[:1]:
            if sampling.grammar is not None:
                scheduler.runtime.text.guides.guide(sampling.grammar)
        return encode(scheduler)

    ids = await asyncio.to_thread(prepare)
    answers: list[Answer] = []
    try:
        for sampling in samplings:
            answers.append(Answer(scheduler, Request(ids, max_tokens, sampling, setting, server.deadline)))
    except DashError:
        for answer in answers:
            scheduler.cancel(answer.ticket)
        raise
    return Begun(name, scheduler, answers, asked)


async def chat(server: Server, http: HttpRequest) -> Response:
    with server.entering():
        asked = await _asked(ChatRequest, http)
        messages = [message.plain() for message in asked.messages]
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None

        def encode(scheduler: Scheduler) -> TokenIds:
            return np.array(scheduler.runtime.text.chat(messages, scheduler.context, asked.given_tools()))

        begun = await begin(server, asked, encode, asked.most_tokens, logprobs)

    def chance(token: Token) -> dict[str, Any] | None:
        if not asked.logprobs:
            return None
        chosen, *others = begun.logprobs(token)
        return {"content": [chosen | {"top_logprobs": others}]}

    if asked.stream:
        return _streamed(begun, "chat.completion.chunk", _chat_chunks(begun, chance))
    found: list[list[Token]] = await _gathered(begun, http)
    choices = []
    for index, (answer, tokens) in enumerate(zip(begun.answers, found, strict=True)):
        content = [entry for token in tokens for entry in (chance(token) or {}).get("content", [])]
        words, calls = split_calls(answer.text) if asked.given_tools() else (answer.text, [])
        message = {"role": "assistant", "content": words or (None if calls else "")}
        choice = {"index": index, "message": message | ({"tool_calls": calls} if calls else {})}
        choice |= {"logprobs": {"content": content} if asked.logprobs else None}
        choices.append(choice | {"finish_reason": "tool_calls" if calls else _FINISH[answer.finish_reason]})
    return JSONResponse(begun.common | {"object": "chat.completion", "choices": choices, "usage": begun.usage(),
                                        "dash": begun.answers[0].dash()})  # fmt: skip


async def _chat_chunks(begun: Begun, chance: Callable[[Token], dict[str, Any] | None]) -> AsyncIterator[dict[str, Any]]:
    for index in range(len(begun.answers)):
        yield {"choices": [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    words = [Words() for _ in begun.answers]
    tools = isinstance(begun.asked, ChatRequest) and bool(begun.asked.given_tools())
    async for index, token in _merged(begun):
        text = words[index].push(token.text) if tools else token.text
        choice = {"index": index, "delta": {"content": text}, "logprobs": chance(token), "finish_reason": None}
        if token.finish_reason is not None:
            rest, calls = split_calls(words[index].held)
            choice["delta"] = {"content": text + rest}
            if text + rest:
                yield {"choices": [choice], **begun.skips(token)}
            if calls:
                pieces = [{"index": place, **call} for place, call in enumerate(calls)]
                yield {"choices": [choice | {"delta": {"tool_calls": pieces}, "logprobs": None}]}
            reason = "tool_calls" if calls else _FINISH[token.finish_reason]
            choice |= {"delta": {}, "logprobs": None, "finish_reason": reason}
        yield {"choices": [choice], **begun.skips(token)}


async def completion(server: Server, http: HttpRequest) -> Response:
    with server.entering():
        asked = await _asked(CompletionRequest, http)
        prompt: Any = asked.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise HttpError(
                    400, "prompt: several prompts in one request are not supported; send one each.", "prompt"
                )
            prompt = prompt[0]
        begun = await begin(
            server, asked, lambda scheduler: scheduler.runtime.checked_ids(prompt), asked.max_tokens, asked.logprobs
        )
    if asked.stream:
        return _streamed(begun, "text_completion", _completion_chunks(begun))
    found = await _gathered(begun, http)
    choices = []
    for index, (answer, tokens) in enumerate(zip(begun.answers, found, strict=True)):
        likely = None
        if asked.logprobs is not None:
            each = [begun.logprobs(token) for token in tokens]
            likely = {
                "tokens": [entries[0]["token"] for entries in each],
                "token_logprobs": [entries[0]["logprob"] for entries in each],
                "top_logprobs": [{entry["token"]: entry["logprob"] for entry in entries[1:]} for entries in each],
            }
        reason = _FINISH[answer.finish_reason]
        choices.append({"index": index, "text": answer.text, "logprobs": likely, "finish_reason": reason})
    return JSONResponse(begun.common | {"object": "text_completion", "choices": choices, "usage": begun.usage(),
                                        "dash": begun.answers[0].dash()})  # fmt: skip


async def _completion_chunks(begun: Begun) -> AsyncIterator[dict[str, Any]]:
    async for index, token in _merged(begun):
        reason = None if token.finish_reason is None else _FINISH[token.finish_reason]
        choice = {"index": index, "text": token.text, "logprobs": None, "finish_reason": reason}
        yield {"choices": [choice], **begun.skips(token)}


def _streamed(begun: Begun, kind: str, chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """Server-sent events. An error in the middle is an event of its own, for the status has been sent."""
    common = begun.common | {"object": kind}

    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield _event(common | chunk)
        except DashError as error:
            said = told(error)
            kind = "server_error" if said.status >= 500 else "invalid_request_error"
            yield _event({"error": {"message": str(said), "type": kind, "param": None, "code": said.code}})
        else:
            options = begun.asked.stream_options
            if options is not None and options.include_usage:
                yield _event(common | {"choices": [], "usage": begun.usage(), "dash": begun.answers[0].dash()})
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _merged(begun: Begun) -> AsyncIterator[tuple[int, Token]]:
    """(index of the answer, token) of all answers, as they come; left early, all are cancelled."""
    queue: asyncio.Queue[tuple[int, Token | None, BaseException | None]] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for token in answer.responses():
                queue.put_nowait((index, token, None))
            queue.put_nowait((index, None, None))
        except DashError as error:
            queue.put_nowait((index, None, error))

    tasks = [asyncio.ensure_future(pump(index, answer)) for index, answer in enumerate(begun.answers)]
    left = len(tasks)
    try:
        while left:
            index, token, error = await queue.get()
            if error is not None:
                raise error
            if token is None:
                left -= 1
            else:
                yield index, token
    finally:
        for task in tasks:
            task.cancel()


async def _gathered(begun: Begun, http: HttpRequest) -> list[list[Token]]:
    """All tokens of all answers; a client that goes away cancels them."""
    found: list[list[Token]] = [[] for _ in begun.answers]

    async def gather() -> None:
        async for index, token in _merged(begun):
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
    return found


async def _body(http: HttpRequest) -> bytes:
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise HttpError(413, f"The body has more than {BODY_BYTES} bytes.")
    return bytes(body)


async def _asked(kind: type[_Asked], http: HttpRequest) -> _Asked:
    """The body as `kind`. Raises HttpError that names the field."""
    try:
        body = await asyncio.wait_for(_body(http), BODY_SECONDS)
    except asyncio.TimeoutError:  # which is another one in Python 3.10
        raise HttpError(408, f"The body was not there after {BODY_SECONDS:g} s.") from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        raise HttpError(400, f"{field or 'The body'}: {first['msg']}.", field) from None
