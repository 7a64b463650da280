"""Chat and plain completions: a request's answers, whole or as server-sent events, in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.errors import DashError
from dash_export.runtime.results import Response as Token
from dash_export.serve.answers import Answer, usage
from dash_export.serve.http_errors import http_error
from dash_export.serve.protocol import ChatRequest, CompletionRequest
from dash_export.serve.running import (
    AnswerStream,
    RunningAnswers,
    answer_tokens,
    begin,
    begin_chat,
    collected_tokens,
    event,
    parsed_request,
)
from dash_export.serve.tools import TextBeforeCalls, split_calls

if TYPE_CHECKING:
    from dash_export.serve.app import Server

Chunks = Callable[[int, Token], Iterator[dict[str, Any]]]
"""Chunks of a stream for a token of the answer with this index."""


async def chat(server: Server, http: HttpRequest) -> Response:
    async with parsed_request(server, ChatRequest, http) as (request, arrival):
        running = await begin_chat(server, request, arrival)

    def chances(each: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return {"content": [entries[0] | {"top_logprobs": entries[1:]} for entries in each if entries]}

    def chance(token: Token) -> dict[str, Any] | None:
        return chances([running.logprobs(token)]) if request.logprobs else None

    if request.stream:
        begin = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        first = ({"choices": [{"index": index, **begin}]} for index in range(len(running.answers)))
        return _streamed(running, "chat.completion.chunk", first, _chat_chunks(running, request, chance))
    found: list[list[Token]] = await collected_tokens(running, http)

    def whole() -> Response:
        choices = []
        for index, (answer, tokens) in enumerate(zip(running.answers, found, strict=True)):
            words, calls = (
                split_calls(answer.text, request.parallel_tool_calls) if request.given_tools() else (answer.text, [])
            )
            message = {"role": "assistant", "content": words or (None if calls else "")}
            choice = {"index": index, "message": message | ({"tool_calls": calls} if calls else {})}
            choice |= {"logprobs": chances(running.likelihoods(answer, tokens)) if request.logprobs else None}
            choices.append(choice | {"finish_reason": _ended(answer.finish_reason, calls)})
        return JSONResponse(running.common | {"object": "chat.completion", "choices": choices} | _figures(running))

    return await asyncio.to_thread(whole)  # a thread, for logprobs take a while


def _figures(running: RunningAnswers) -> dict[str, Any]:
    """Return `usage`, which contains `dash`, and `dash` again beside it: some clients keep only one of the two."""
    said = usage(running.answers)
    return {"usage": said, "dash": said["dash"]}


def _ended(reason: str, calls: list[Any]) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


def _chat_chunks(
    running: RunningAnswers, request: ChatRequest, chance: Callable[[Token], dict[str, Any] | None]
) -> Chunks:
    words, tools = [TextBeforeCalls() for _ in running.answers], bool(request.given_tools())

    def chunks(index: int, token: Token) -> Iterator[dict[str, Any]]:
        text = words[index].push(token.text) if tools else token.text
        choice = {"index": index, "delta": {"content": text}, "logprobs": chance(token), "finish_reason": None}
        skips = running.skips(token)
        if token.finish_reason is not None:
            rest, calls = split_calls(words[index].held, request.parallel_tool_calls)
            if text + rest or choice["logprobs"]:
                yield {"choices": [choice | {"delta": {"content": text + rest}}], **skips}
                skips = {}
            if calls:
                pieces = [{"index": place, **call} for place, call in enumerate(calls)]
                yield {"choices": [choice | {"delta": {"tool_calls": pieces}, "logprobs": None}]}
            choice |= {"delta": {}, "logprobs": None, "finish_reason": _ended(token.finish_reason, calls)}
        yield {"choices": [choice], **skips}

    return chunks


async def completion(server: Server, http: HttpRequest) -> Response:
    async with parsed_request(server, CompletionRequest, http) as (request, arrival):
        running = await begin(
            server,
            request,
            lambda scheduler: scheduler.ids(request.prompt),
            request.max_tokens,
            request.logprobs,
            arrival,
        )

    def choice(index: int, said: Answer | Token, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish_reason}

    if request.stream:

        def chunks(index: int, token: Token) -> Iterator[dict[str, Any]]:
            logprobs = None if request.logprobs is None else _likelihoods([running.logprobs(token)])
            yield {"choices": [choice(index, token, logprobs)], **running.skips(token)}

        return _streamed(running, "text_completion", (), chunks)
    found = await collected_tokens(running, http)

    def whole() -> Response:
        choices = []
        for index, (answer, tokens) in enumerate(zip(running.answers, found, strict=True)):
            likely = None if request.logprobs is None else _likelihoods(running.likelihoods(answer, tokens))
            choices.append(choice(index, answer, likely))
        return JSONResponse(running.common | {"object": "text_completion", "choices": choices} | _figures(running))

    return await asyncio.to_thread(whole)


def _likelihoods(found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    each = [entries for entries in found if entries]
    return {
        "tokens": [entries[0]["token"] for entries in each],
        "token_logprobs": [entries[0]["logprob"] for entries in each],
        # Of entries with the same text, parts of a character, the likeliest stays.
        "top_logprobs": [{entry["token"]: entry["logprob"] for entry in entries[:0:-1]} for entries in each],
    }


def _streamed(running: RunningAnswers, kind: str, first: Iterable[dict[str, Any]], chunks: Chunks) -> Response:
    """Send `first` and the chunks of each token as server-sent events. An error becomes an event, because the HTTP
    status is already sent.
    """
    common = running.common | {"object": kind}

    def joined(some: Iterable[dict[str, Any]]) -> str:
        return "".join(event(common | chunk) for chunk in some)

    async def events() -> AsyncIterator[str]:
        try:
            if begins := joined(first):
                yield begins
            async for tokens in answer_tokens(running):
                yield joined(chunk for index, token in tokens for chunk in chunks(index, token))
        except DashError as error:
            yield event(http_error(error).record())
        else:
            options = running.asked.stream_options
            if options is not None and options.include_usage:
                yield event(common | {"choices": []} | _figures(running))
        yield "data: [DONE]\n\n"

    return AnswerStream(running, events())
