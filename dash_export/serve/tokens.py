"""/tokenize, /detokenize and /tokenizer_info, in vLLM's form: what a client needs to count in this model's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.errors import RequestError
from dash_export.runtime.results import checked_tokens
from dash_export.serve.fields import Few, refuse
from dash_export.serve.messages import Message
from dash_export.serve.protocol import Asked, ChatRequest, Ids
from dash_export.serve.running import chat_ids, in_thread, parsed_request
from dash_export.serve.tools import Tool
from dash_export.text.guidance import call_tokenizer

if TYPE_CHECKING:
    from dash_export.serve.app import Server


class TokenizeRequest(Asked):
    """POST /tokenize: of a text, or of a chat as /v1/chat/completions would read it."""

    prompt: str | None = None
    messages: Annotated[list[Message], Few] | None = None
    tools: Annotated[list[Tool], Few] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "give a prompt or messages, one of them")
        self.chat()
        return self

    def chat(self) -> ChatRequest | None:
        """Return the request as one of a chat. Raises ValidationError (pydantic's)."""
        if self.messages is None:
            return None
        same = ("messages", "tools", "add_generation_prompt", "continue_final_message")
        return ChatRequest.model_validate({name: getattr(self, name) for name in same})


class DetokenizeRequest(Asked):
    """POST /detokenize."""

    tokens: Ids


async def tokenize(server: Server, http: HttpRequest) -> Response:
    async with parsed_request(server, TokenizeRequest, http) as (request, arrival):
        _, scheduler = server.scheduler(request.model.partition("@")[0])
        text, chat = scheduler.runtime.text, request.chat()

        def work() -> Response:
            if chat is not None:
                ids = chat_ids(chat, scheduler)
            else:
                most = scheduler.runtime.engines.model.max_positions
                ids = text.encode(request.prompt or "", special=request.add_special_tokens, limit=most)
            pieces = [text.tokenizer.id_to_token(one) for one in ids] if request.return_token_strs else None
            told = {"count": len(ids), "max_model_len": scheduler.context, "tokens": ids, "token_strs": pieces}
            return JSONResponse(told)  # here, for a million tokens take a while

        return await in_thread(server, arrival, work)


async def detokenize(server: Server, http: HttpRequest) -> Response:
    async with parsed_request(server, DetokenizeRequest, http) as (request, arrival):
        _, scheduler = server.scheduler(request.model.partition("@")[0])
        runtime, ids = scheduler.runtime, request.tokens
        if len(ids) > (most := runtime.engines.model.max_positions):  # a token may be a hundred letters
            raise RequestError(f"tokens: {len(ids)} are more than the {most} that the model reads: send parts of them.")

        def work() -> Response:
            if ids:
                checked_tokens(ids, runtime.engines.model.vocab_size)
            decode = runtime.text.tokenizer.decode
            written = call_tokenizer("cannot write these tokens", lambda: decode(ids, skip_special_tokens=False))
            return JSONResponse({"prompt": written})

        return await in_thread(server, arrival, work)


async def tokenizer_info(server: Server, http: HttpRequest) -> Response:
    """Return the special tokens and the chat template of a model, by `?model=` where there are several."""
    _, scheduler = server.scheduler(http.query_params.get("model", ""))
    text = scheduler.runtime.text
    known = {name: token or None for name, token in text.special.items()}
    return JSONResponse(known | {"chat_template": None if text.template is None else text.template.source})
