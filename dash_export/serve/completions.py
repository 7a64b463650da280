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
from dash_export.text.tokenizer import TextStream

if TYPE_CHECKING:
    from dash_export.serve.app import Server

Chunks = Callable[[int, Token], Iterator[dict[str, Any]]]
"""Chunks of a stream for a token of the answer with this index."""
Entries = Iterable[tuple[int, list[dict[str, Any]]]]
"""Tokens, each with its logprobs as chat completions list them."""


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
            words, calls = answer.text, list[Any]()
            if request.given_tools():
                words, calls = split_calls(words, request.parallel_tool_calls)
            message = {"role": "assistant", "content": words or (None if calls else "")}
            choice = {"index": index, "message": message | ({"tool_calls": calls} if calls else {})}
            choice |= {"logprobs": chances(running.likelihoods(answer, tokens)) if request.logprobs else None}
            choices.append(choice | {"finish_reason": _ended(answer.finish_reason, calls)})
        return JSONResponse(running.common | {"object": "chat.completion", "choices": choices} | _figures(running))

    return await asyncio.to_thread(whole)  # a thread, for logprobs take a while


def _figures(running: RunningAnswers) -> dict[str, Any]:
    """Return `usage`, which contains `dash`, and `dash` again beside it: some clients keep only one of the two."""
    said = usage(running.answers, running.asked.n or 1)
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
            lambda scheduler: [scheduler.ids(prompt) for prompt in request.prompt],
            request.max_tokens or (1 if request.max_tokens == 0 else None),
            request.logprobs,
            arrival,
            request.reading(),
        )
    told = [_Told(running, answer, request, index) for index, answer in enumerate(running.answers)]
    if request.stream:

        def chunks(index: int, token: Token) -> Iterator[dict[str, Any]]:
            if request.echo and token.statistics.tokens < 2:
                yield {"choices": [told[index].prompt()]}
            entries = [] if request.logprobs is None else [(token.token, running.logprobs(token))]
            yield {"choices": [told[index].choice(token, entries)], **running.skips(token)}

        return _streamed(running, "text_completion", (), chunks)
    found = await collected_tokens(running, http)

    def whole() -> Response:
        choices = []
        for one, answer, tokens in zip(told, running.answers, found, strict=True):
            before = one.prompt() if request.echo else None
            entries = [] if request.logprobs is None else running.likelihoods(answer, tokens)
            ids = [token.token for token in tokens]
            choices.append(_joined(before, one.choice(answer, zip(ids, entries, strict=False))))
        return JSONResponse(running.common | {"object": "text_completion", "choices": choices} | _figures(running))

    return await asyncio.to_thread(whole)


class _Told:
    """Builder of an answer's choice, or of its pieces: `text_offset` counts on from one to the next."""

    def __init__(self, running: RunningAnswers, answer: Answer, request: CompletionRequest, index: int) -> None:
        self._running, self._answer, self._request, self._index = running, answer, request, index
        self._text, self._length = running.scheduler.runtime.text, 0
        self._stream: TextStream | None = None

    def prompt(self) -> dict[str, Any]:
        """Return the prompt as a choice."""
        ids, given = self._answer.ticket.ids.tolist(), self._request.prompt[self._index // (self._request.n or 1)]
        entries = [] if self._request.logprobs is None else self._running.prompt(self._answer)
        text = given if isinstance(given, str) else self._text.decode(ids)
        found = self._choice(text, None, zip(ids, entries, strict=False), TextStream(self._text.tokenizer))
        self._length = len(text)
        return found

    def choice(self, said: Answer | Token, entries: Entries) -> dict[str, Any]:
        """Return an answer, or a piece of one."""
        if self._stream is None:
            self._stream = TextStream(self._text.tokenizer, after=int(self._answer.ticket.ids[-1]))
        return self._choice(said.text, said.finish_reason, entries, self._stream)

    def _choice(self, text: str, reason: str | None, entries: Entries, stream: TextStream) -> dict[str, Any]:
        logprobs = None if self._request.logprobs is None else self._likelihoods(entries, stream)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _likelihoods(self, found: Entries, stream: TextStream) -> dict[str, Any]:
        each, places = list[list[dict[str, Any]]](), list[int]()
        for token, entries in found:
            if entries:  # else it ends the turn
                each.append(entries)
                certain = len(stream.push(token))  # with parts of characters that came before
                self._length += certain
                places.append(self._length - min(certain, len(entries[0]["token"])))
        return {
            "tokens": [entries[0]["token"] for entries in each],
            "token_logprobs": [entries[0]["logprob"] for entries in each],
            # Of entries with the same text, parts of a character, the likeliest stays.
            "top_logprobs": [
                None if entries[0]["logprob"] is None else {one["token"]: one["logprob"] for one in entries[:0:-1]}
                for entries in each
            ],
            "text_offset": places,
        }


def _joined(before: dict[str, Any] | None, choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice that begins with the prompt, where it is echoed."""
    if before is None:
        return choice
    first, then = before["logprobs"], choice["logprobs"]
    logprobs = None if then is None else {name: first[name] + then[name] for name in then}
    return choice | {"text": before["text"] + choice["text"], "logprobs": logprobs}


def _streamed(running: RunningAnswers, kind: str, first: Iterable[dict[str, Any]], chunks: Chunks) -> Response:
    """Send `first` and each token's chunks as server-sent events. An error becomes one: the status is sent already."""
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
