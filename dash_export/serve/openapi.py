"""The OpenAPI document of the endpoint, from the models that read its requests."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from dash_export import __version__
from dash_export.serve.pooled import EmbeddingsRequest
from dash_export.serve.protocol import Asked, ChatRequest, CompletionRequest
from dash_export.serve.responses import ResponsesRequest
from dash_export.serve.tokens import DetokenizeRequest, TokenizeRequest

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
Posts = Mapping[str, tuple[type[Asked], str, tuple[str, ...]]]
"""Path -> what reads its requests, a line about it, and what its answers always have."""
_SAID = ("id", "object", "model", "usage")
POSTS: Posts = {
    "/v1/chat/completions": (ChatRequest, "Answer messages.", (*_SAID, "choices")),
    "/v1/completions": (CompletionRequest, "Go on with texts.", (*_SAID, "choices")),
    "/v1/responses": (ResponsesRequest, "Answer messages, in OpenAI's newer form.", (*_SAID, "output")),
    "/v1/embeddings": (EmbeddingsRequest, "Read texts into vectors.", ("object", "data", "model", "usage")),
    "/tokenize": (TokenizeRequest, "Read a text into tokens.", ("count", "max_model_len", "tokens")),
    "/detokenize": (DetokenizeRequest, "Write tokens as a text.", ("prompt",)),
}
_GETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "/v1/models": ("The models.", "application/json", {"type": "object", "required": ["object", "data"]}),
    "/v1/models/{name}": ("A model.", "application/json", {"type": "object", "required": ["id"]}),
    "/tokenizer_info": ("Special tokens and chat template.", "application/json", {"type": "object"}),
    "/health": ("Whether requests are taken.", "application/json", {"type": "object", "required": ["status"]}),
    "/metrics": ("Counters, for Prometheus.", "text/plain", {"type": "string"}),
}


_KEYED = ("/v1/models", "/v1/models/{name}", "/tokenizer_info")


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def document(models: Collection[str], keyed: bool, posts: Posts = POSTS) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these models. `keyed`: the server asks for an API key."""
    _, schemas = models_json_schema(
        [(model, "validation") for model, *_ in posts.values()], ref_template="#/components/schemas/{model}"
    )
    text: dict[str, Any] = {"type": "string"}
    error = {"message": text, "type": text, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    components = schemas["$defs"] | {
        "Error": {
            "type": "object",
            "properties": {"error": {"type": "object", "properties": error, "required": [*error]}},
            "required": ["error"],
        }
    }
    event = {"type": "object", "required": ["data"], "properties": {"data": text, "event": text}}
    refused = {
        status: {"description": said, **_content("application/json", {"$ref": "#/components/schemas/Error"})}
        for status, said in _ERRORS.items()
    }
    refused["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    paths: dict[str, Any] = {}
    for path, (model, what, holds) in posts.items():
        components[model.__name__]["properties"]["model"]["examples"] = [*models]
        components[model.__name__]["properties"] |= {name: {} for name in model.idle}
        found: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": [*holds]}}}
        if "stream" in model.model_fields:
            found["text/event-stream"] = {"schema": event}
        paths[path] = {
            "post": {
                "summary": what,
                "requestBody": {
                    "required": True,
                    **_content("application/json", {"$ref": f"#/components/schemas/{model.__name__}"}),
                },
                "responses": {"200": {"description": "The answer; with `stream`, as events.", "content": found}}
                | refused,
            }
        }
    gets = {path: get for path, get in _GETS.items() if path != "/tokenizer_info" or "/tokenize" in posts}
    for path, (what, kind, schema) in gets.items():
        answers = {"200": {"description": what, **_content(kind, schema)}, "403": refused["403"]}
        answers |= {"401": refused["401"]} if path in _KEYED else {}
        answers |= {"503": {"description": "Not now.", **_content(kind, schema)}} if path == "/health" else {}
        operation: dict[str, Any] = {"summary": what, "responses": answers}
        if path == "/tokenizer_info":
            answers |= {"404": refused["404"]}
            model_schema = {"type": "string", "enum": [*models]}
            operation["parameters"] = [{"name": "model", "in": "query", "required": True, "schema": model_schema}]
        if path.endswith("{name}"):
            answers["404"] = refused["404"]
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"enum": [*models]}}]
        paths[path] = {"get": operation}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "dash-export", "version": __version__, "description": "OpenAI's API, with `dash`: how fast."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in (*posts, *_KEYED):
            for operation in paths.get(path, {}).values():
                operation["security"] = [{"key": []}]
    return made
