"""Fields that are known, those that are not, and what counts as a number."""

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from dash_export.serve.protocol import ChatRequest
from tests.serve.test_app import MESSAGES

CHAT = {"messages": MESSAGES, "max_tokens": 2}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
SAID = [{"type": "output_text", "text": "b", "annotations": []}]


@pytest.mark.parametrize(("path", "field"), [("/v1/chat/completions", "logit_bias"), ("/v1/responses", "metadata")])
def test_entries_that_are_too_many_are_not_read(path: str, field: str, http: httpx.Client) -> None:
    """Each is a mistake of its own: of 300,000 they stopped the server for 8 s and took 450 MB."""
    reply = http.post(path, json=ASKED[path] | {field: {f"x{entry}": [] for entry in range(1025)}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
    assert "more than 1024 entries" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ASKED)
def test_an_unknown_field_is_refused_with_the_known_ones(path: str, http: httpx.Client) -> None:
    """In OpenAI's form. A null asks for nothing, and neither does what changes no answer."""
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "guided_regexp": None}
    assert http.post(path, json=ASKED[path] | harmless).status_code == 200
    reply = http.post(path, json=ASKED[path] | {"guided_regexp": "[0-9]+"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "guided_regexp", "unknown_parameter")
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("guided_regexp: there is no such field. Known: ")
    assert {*ASKED[path]} <= {*error["message"].rstrip(".").partition("Known: ")[2].split(", ")}


@pytest.mark.parametrize(
    ("path", "given", "field"),
    [
        ("chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        (
            "chat/completions",
            {"messages": [*MESSAGES, {"role": "assistant", "audio": {"id": "a"}}]},
            "messages.1.audio",
        ),
        ("completions", {"suffix": "y"}, "suffix"),
        ("completions", {"best_of": 3}, "best_of"),
        ("responses", {"include": ["reasoning.encrypted_content"]}, "include"),
        ("responses", {"truncation": "auto"}, "truncation"),
        ("embeddings", {"dimensions": 8}, "dimensions"),
    ],
)
def test_what_openai_has_and_this_server_has_not(
    path: str, given: dict[str, Any], field: str, http: httpx.Client
) -> None:
    error = http.post(f"/v1/{path}", json=ASKED[f"/v1/{path}"] | given).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert error["message"].startswith(f"{field}: OpenAI's API has this field, this server has not. Known: ")


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("chat/completions", {"modalities": ["text"], "verbosity": "medium", "functions": [], "audio": None}),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True,
                                                                                          "schema": {}}}}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {
                                            "type": "ephemeral"}}]}]}),
        ("completions", {"suffix": "", "best_of": 1}),
        ("responses", {"include": [], "truncation": "disabled", "background": False, "reasoning": {}}),
        ("responses", {"input": [{"id": "msg_1", "status": "completed", "type": "message", "role": "assistant",
                                  "content": SAID}, *MESSAGES]}),
    ],
)  # fmt: skip
def test_what_asks_for_nothing(path: str, given: dict[str, Any], http: httpx.Client) -> None:
    """OpenAI's defaults, and what its own clients send back."""
    reply = http.post(f"/v1/{path}", json=ASKED[f"/v1/{path}"] | given)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"dash": {"bugdet": 0.9}}, "dash.bugdet"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": [*MESSAGES, {"role": "user", "content": "a", "text": "b"}]}, "messages.1.text"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema"),
    ],
)
def test_inside_of_objects_too(given: dict[str, Any], field: str, http: httpx.Client) -> None:
    error = http.post("/v1/chat/completions", json=CHAT | given).json()["error"]
    assert (error["param"], error["code"]) == (field, "unknown_parameter")


@pytest.mark.parametrize("value", [True, "2"])
@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "temperature", "top_p", "presence_penalty"])
def test_what_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="expected a number"):
        ChatRequest.model_validate(CHAT | {name: value})


def test_roles_and_likelihoods(http: httpx.Client) -> None:
    for given, field, said in (
        ({"messages": [{"role": "pirate", "content": "Arr"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ):
        reply = http.post("/v1/chat/completions", json=CHAT | given)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
        assert said in reply.json()["error"]["message"]
    assert http.post("/v1/chat/completions", json=CHAT | {"top_logprobs": 0}).status_code == 200
