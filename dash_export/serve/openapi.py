"""The OpenAPI document of the endpoint, from the models that read its requests."""

from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from dash_export import __version__
from dash_export.serve.completions import chat, completion
from dash_export.serve.pooled import EmbeddingsRequest, embeddings
from dash_export.serve.protocol import Asked, ChatRequest, CompletionRequest
from dash_export.serve.responses import ResponsesRequest, responses
from dash_export.serve.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

Posts = Mapping[str, tuple[Callable[[Any, Request], Coroutine[Any, Any, Response]], type[Asked], str, tuple[str, ...]]]
"""Path -> its handler, what reads its requests, a line about it, and what its answers always have."""
_SAID = ("id", "object", "model", "usage")
POSTS: Posts = {
    "/v1/chat/completions": (chat, ChatRequest, "Answer messages.", (*_SAID, "choices")),
    "/v1/completions": (completion, CompletionRequest, "Go on with texts.", (*_SAID, "choices")),
    "/v1/responses": (responses, ResponsesRequest, "Answer messages, in OpenAI's newer form.", (*_SAID, "output")),
    "/v1/embeddings": (embeddings, EmbeddingsRequest, "Read texts into vectors.", ("object", "data", "model", "usage")),
    "/tokenize": (tokenize, TokenizeRequest, "Read a text into tokens.", ("count", "max_model_len", "tokens")),
    "/detokenize": (detokenize, DetokenizeRequest, "Write tokens as a text.", ("prompt",)),
}
_GETS = {
    "/v1/models": ("The models.", ("object", "data")),
    "/v1/models/{name}": ("A model.", ("id",)),
    "/tokenizer_info": ("Special tokens and chat template.", ()),
    "/health": ("Whether requests are taken; 503 where they are not.", ("status",)),
    "/metrics": ("Counters, for Prometheus.", None),
}
_ERRORS = {
    "400": "The request is wrong: `message` and `param` say where.",
    "401": "The API key is missing or wrong.",
    "403": "The page's origin, or the name it knows this server by, is not allowed.",
    "404": "There is no such model, or path.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "The queue is full: ask again after `Retry-After` seconds.",
    "500": "The server made a mistake.",
    "504": "The request's time was over.",
}
_TEXT: dict[str, Any] = {"type": "string"}
_OPEN = {"type": ["string", "null"]}
_ERROR = {"message": _TEXT, "type": _TEXT, "param": _OPEN, "code": _OPEN}


def _object(holds: Collection[str]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": [*holds]}}


def _parameter(name: str, where: str, models: Collection[str]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": True, "schema": {**_TEXT, "enum": [*models]}}


def document(models: Collection[str], keyed: bool, posts: Posts) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these models. `keyed`: it asks for an API key."""
    asked: list[Any] = [(model, "validation") for _, model, *_ in posts.values()]
    components = models_json_schema(asked, ref_template="#/components/schemas/{model}")[1]["$defs"]
    components["Error"] = {
        "type": "object",
        "properties": {"error": {"type": "object", "properties": _ERROR, "required": [*_ERROR]}},
        "required": ["error"],
    }
    shown = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {status: {"description": said, "content": shown} for status, said in _ERRORS.items()}
    paths: dict[str, Any] = {}
    for path, (_, model, what, holds) in posts.items():
        fields = components[model.__name__]["properties"]
        fields["model"]["examples"] = [*models]
        fields |= {name: {} for name in model.idle}
        found = {"application/json": _object(holds)}
        if "stream" in fields:
            found["text/event-stream"] = _object(["data"])
        given = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
        answers = {"200": {"description": "The answer; with `stream`, as events.", "content": found}}
        paths[path] = {
            "post": {
                "summary": what,
                "requestBody": {"required": True, "content": given},
                "responses": answers | refused,
            }
        }
    for path, (what, facts) in _GETS.items():
        content = {"text/plain": {"schema": _TEXT}} if facts is None else {"application/json": _object(facts)}
        answers = {status: {"description": what, "content": content} for status in ("200", "503")}
        paths[path] = {"get": {"summary": what, "responses": answers | refused}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [_parameter("name", "path", models)]
    if "/tokenize" in posts:
        paths["/tokenizer_info"]["get"]["parameters"] = [_parameter("model", "query", models)]
    else:
        del paths["/tokenizer_info"]
    info = {"title": "dash-export", "version": __version__, "description": "OpenAI's API, with `dash`: how fast."}
    made: dict[str, Any] = {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        for path in ("/health", "/metrics"):
            paths[path]["get"]["security"] = []
    return made
