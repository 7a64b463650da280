"""/v1/responses: OpenAI's newer API, translated to chats. Nothing is stored: a request holds the whole conversation."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.errors import DashError, RequestError
from dash_export.serve.answers import usage
from dash_export.serve.fields import MOST, Few, FewEntries, Fields, Whole
from dash_export.serve.http_errors import HttpError, http_error
from dash_export.serve.messages import ContentPart
from dash_export.serve.protocol import Body, ChatRequest
from dash_export.serve.running import (
    AnswerStream,
    RunningAnswers,
    answer_tokens,
    begin_chat,
    collected_tokens,
    event,
    parsed_request,
)
from dash_export.serve.tools import Function, Json, TextBeforeCalls, split_calls

if TYPE_CHECKING:
    from dash_export.serve.app import Server


class InputItem(Fields):
    """A message, a call of the model's, or what a call gave."""

    idle = frozenset({"id", "status"})

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Annotated[list[ContentPart], Few] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[ContentPart], Few] | None = None

    def message(self) -> dict[str, Any]:
        """Return the item as a message of a chat. Raises RequestError."""
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _texts(self.output) or ""}
        if self.type == "function_call":
            function = {"name": self.name or "", "arguments": self.arguments or "{}"}
            call = {"id": self.call_id or "", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.role is None:
            raise RequestError("input: a message has a role.")
        return {"role": self.role, "content": _texts(self.content)}


def _texts(content: str | list[ContentPart] | None) -> Any:
    """Return content with its texts as chats have them; here their types are input_text and output_text."""
    if isinstance(content, list):
        return [{"type": part.type if part.text is None else "text", "text": part.text} for part in content]
    return content


class FlatTool(Function):
    type: Literal["function"]


class FlatToolName(Fields):
    type: Literal["function"]
    name: str


class TextFormat(Fields):
    idle = frozenset({"name", "description", "strict"})
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: Json | None = Field(None, alias="schema")


class TextOptions(Fields):
    undone: ClassVar[dict[str, Any]] = {"verbosity": "medium"}
    format: TextFormat = TextFormat.model_validate({})


class ResponsesRequest(Body):
    """POST /v1/responses."""

    idle = Body.idle | {"stream_options"}
    undone: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("background", "context_management", "conversation", "include", "max_tool_calls", "moderation",
                         "previous_response_id", "prompt", "reasoning", "top_logprobs")),
        "truncation": "disabled",
    }  # fmt: skip
    input: str | Annotated[list[InputItem], Few] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: Whole | None = Field(None, ge=1, le=MOST)
    text: TextOptions = Field(default_factory=TextOptions)
    tools: Annotated[list[FlatTool], Few] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FlatToolName = "auto"
    parallel_tool_calls: bool = True
    metadata: Annotated[dict[str, str], Field(max_length=16), FewEntries] | None = None

    def chat(self) -> ChatRequest:
        """Return the request as one of /v1/chat/completions. Raises RequestError, and ValidationError (pydantic's)."""
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = list[dict[str, Any]]()
        for item in items:
            message = item.message()
            if item.type == "function_call" and messages and messages[-1]["role"] == "assistant":  # of the same turn
                messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
            else:
                messages.append(message)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        form, choice = self.text.format, self.tool_choice
        schema = None if form.schema_ is None else {"schema": form.schema_}
        same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
        given: dict[str, Any] = {name: getattr(self, name) for name in same} | {"dash": self.dash.model_dump()}
        given |= {"messages": messages, "max_tokens": self.max_output_tokens}
        given["response_format"] = {"type": form.type, "json_schema": schema}
        given["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools]
        named = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        return ChatRequest.model_validate(given | {"tool_choice": named})


async def responses(server: Server, http: HttpRequest) -> Response:
    async with parsed_request(server, ResponsesRequest, http) as (request, arrival):
        try:
            chat = request.chat()
        except ValidationError as error:  # mistakes that only a chat shows, like bad arguments
            raise HttpError(400, f"input: {error.errors(include_url=False)[0]['msg']}.", "input") from None
        running = await begin_chat(server, chat, arrival)
    reply = _Reply(request, chat, running)
    if request.stream:
        return AnswerStream(running, _events(reply))
    await collected_tokens(running, http)
    (answer,) = running.answers
    return JSONResponse(reply.told(reply.ended(), reply.output(answer.text)))


class _Reply:
    """Builder of the response object while the answer grows."""

    def __init__(self, request: ResponsesRequest, chat: ChatRequest, running: RunningAnswers) -> None:
        self.running, self._tools = running, bool(chat.given_tools())
        self.message = f"msg_{uuid.uuid4().hex}"
        sampling = chat.sampling()
        self._common = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": running.common["created"],
            "model": running.common["model"],
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": chat.parallel_tool_calls,
            "previous_response_id": None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": request.model_dump(include={"tool_choice"})["tool_choice"],
            "tools": [tool.model_dump() | {"strict": False} for tool in request.tools],
        }

    def ended(self) -> str:
        return "incomplete" if self.running.answers[0].finish_reason == "length" else "completed"

    def told(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole response object. Its `usage` is None until the answer ends."""
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        known = self._common | {"status": status, "incomplete_details": why, "output": output, "usage": None}
        if status != "in_progress":
            said = usage(self.running.answers)
            known["usage"] = {
                "input_tokens": said["prompt_tokens"],
                "input_tokens_details": said["prompt_tokens_details"],
                "output_tokens": said["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": said["total_tokens"],
                "dash": said["dash"],
            }
            known["dash"] = said["dash"]
        return known

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
        return {"type": "message", "id": self.message, "role": "assistant", "status": status, "content": content}

    def output(self, text: str) -> list[dict[str, Any]]:
        """Return the output items: a message, unless the answer consists of calls only, and then the calls."""
        words, calls = split_calls(text, self._common["parallel_tool_calls"]) if self._tools else (text, [])
        items = [] if calls and not words else [self.item(self.ended(), words)]
        for call in calls:
            known = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "status": "completed"}
            items.append(known | {"call_id": call["id"], **call["function"]})
        return items


async def _events(reply: _Reply) -> AsyncIterator[str]:
    """Yield events, numbered and named as OpenAI does. A message begins with its first words; whole calls come last."""
    number = -1

    def say(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return f"event: {kind}\n" + event({"type": kind, "sequence_number": number, **fields})

    part: dict[str, Any] = {"item_id": reply.message, "output_index": 0, "content_index": 0}
    words, begun, said = TextBeforeCalls(), False, ""
    yield say("response.created", response=reply.told("in_progress", []))
    yield say("response.in_progress", response=reply.told("in_progress", []))
    try:
        async for tokens in answer_tokens(reply.running):
            piece = "".join(words.push(token.text) if reply._tools else token.text for _, token in tokens)
            if tokens[-1][1].finish_reason is not None:
                piece += split_calls(words.held)[0]
            if piece and not begun:
                begun = True
                yield say("response.output_item.added", output_index=0, item=reply.item("in_progress", None))
                empty = {"type": "output_text", "text": "", "annotations": []}
                yield say("response.content_part.added", **part, part=empty)
            if piece:
                said += piece
                yield say("response.output_text.delta", **part, delta=piece, logprobs=[])
    except DashError as error:
        said_of = {"code": "server_error", "message": str(http_error(error))}
        yield say("response.failed", response=reply.told("failed", []) | {"error": said_of})
        return
    (answer,) = reply.running.answers
    output = reply.output(answer.text)
    if begun:
        item = reply.item(reply.ended(), said)
        output = [item, *(other for other in output if other["type"] != "message")]
        yield say("response.output_text.done", **part, text=said, logprobs=[])
        yield say("response.content_part.done", **part, part=item["content"][0])
        yield say("response.output_item.done", output_index=0, item=item)
    for index, item in enumerate(output):
        if item["type"] != "function_call":
            continue
        given = {"item_id": item["id"], "output_index": index}
        yield say("response.output_item.added", output_index=index, item=item | {"arguments": ""})
        yield say("response.function_call_arguments.delta", **given, delta=item["arguments"])
        yield say("response.function_call_arguments.done", **given, name=item["name"], arguments=item["arguments"])
        yield say("response.output_item.done", output_index=index, item=item)
    yield say(f"response.{reply.ended()}", response=reply.told(reply.ended(), output))
