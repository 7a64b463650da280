"""Fields of requests: what is refused, in OpenAI's form, and what asks for nothing."""

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from dash_export.serve.fields import UNKNOWN, UNSUPPORTED
from dash_export.serve.protocol import ChatRequest
from tests.serve.test_app import MESSAGES

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 2},
    COMPLETIONS: {"prompt": "x", "max_tokens": 2},
    RESPONSES: {"input": "x", "max_output_tokens": 2},
    EMBEDDINGS: {"input": "x"},
    TOKENIZE: {"prompt": "x"},
    DETOKENIZE: {"tokens": [5]},
}
FORM: dict[str, Any] = {"type": "json_schema"}
OBJECT = {"type": "json_object"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
FLAT = {"type": "function", "name": "f"}
SAID = [{"type": "output_text", "text": "b", "annotations": []}]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


# path, what is changed, the field that is named, a part of the message
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "Field required"),
    (CHAT, {"messages": [{"role": "pirate", "content": "Arr"}]}, "messages.0.role", "'system', 'developer', 'user'"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function", "required"),
    (CHAT, {"messages": [user("a b " * 400)]}, "messages", "context"),
    (CHAT, {"max_tokens": 10_000}, "messages", "context"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"temperature": 3}, "temperature", "less than or equal to 2"),
    (CHAT, {"temperature": "x"}, "temperature", "expected a number"),
    (CHAT, {"n": 100}, "n", "less than or equal to 16"),
    (CHAT, {"stop": [""]}, None, "stop"),
    (CHAT, {"stop": 5}, "stop", "valid string; or Input should be a valid array"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    (CHAT, {"logit_bias": {"500": 3}}, None, "logit_bias: this model has the tokens 0 to 299"),
    (CHAT, {"logit_bias": {"5": 300}}, None, "logit_bias must be token ids with numbers between -100"),
    (CHAT, {"logit_bias": {"hello": 3}}, "logit_bias.hello", "valid integer"),
    (CHAT, {"logit_bias": {f"x{entry}": [] for entry in range(1025)}}, "logit_bias", "more than 1024 entries"),
    (CHAT, {"dash": {"budget": 0.9, "skipped": 2}}, None, "budget or skipped"),
    (CHAT, {"dash": {"budget": 0.01}}, None, "A budget of 0.01 is below the 0."),
    (CHAT, {"dash": {"policy": "os:system"}}, "dash.policy", "Input should be 'dense'"),
    (CHAT, {"dash": {"hold": False}}, None, "hold is of a budget"),
    (CHAT, {"model": "gpt"}, "model", "There is no model 'gpt' here. Known: tiny."),
    (CHAT, {"model": "tiny@policy=os:system"}, None, "policy"),
    (CHAT, {"model": "tiny@fast"}, None, "is not like NAME@budget=0.9"),
    (CHAT, {"model": "tiny@budget=0.9,budget=0.8"}, None, "each once"),
    (CHAT, {"model": "tiny@skips=true"}, None, "each once"),
    (CHAT, {"model": "tiny@budget=0.9", "dash": {"policy": "dense"}}, None, "leave one out"),
    (CHAT, {"model": "tiny@budget=x"}, None, "budget"),
    (CHAT, {"guided_regex": "a", "guided_json": {}}, None, "guided_json and guided_regex exclude each other"),
    (CHAT, {"guided_regex": "a", "response_format": OBJECT}, None, "guided_regex and response_format exclude"),
    (CHAT, {"guided_regex": "("}, None, "cannot be read"),
    (CHAT, {"guided_json": "{"}, "guided_json", "EOF"),
    (CHAT, {"guided_grammar": 'root ::= "a"'}, None, "gbnf_to_lark"),
    (CHAT, {"continue_final_message": True}, "continue_final_message", "the last message has to be"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "a"}], "continue_final_message": True,
         "add_generation_prompt": True},
        "add_generation_prompt", "a continued message has none",
    ),
    (CHAT, {"response_format": FORM | {"json_schema": {"schema": {"type": "no"}}}}, None, "cannot be read"),
    (CHAT, {"response_format": FORM}, None, "json_schema is missing"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    (CHAT, {"tools": [TOOL]}, None, "takes no tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "match pattern"),
    (CHAT, {"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "x"}}}, None, "no such function"),
    (CHAT, {"tool_choice": "required"}, None, "no such function is among the 0 tools"),
    (CHAT, {"tool_choice": 5}, "tool_choice", "Input should be 'none', 'auto'"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt", "expected token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "expected a text"),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt", "over 1024 prompts"),
    (COMPLETIONS, {"prompt": ["a"] * 40, "n": 2}, None, "80 answers at once, and the queue takes 64"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "0 is for echo"),
    (RESPONSES, {"input": []}, "input", "at least 1"),
    (RESPONSES, {"input": [*MESSAGES, {"type": "reasoning"}]}, "input.1.type", "Input should be 'message'"),
    (RESPONSES, {"input": [{"content": "y"}]}, None, "a message has a role"),
    (RESPONSES, {"input": [user([{"type": "input_image"}])]}, None, "content of type 'input_image'"),
    (RESPONSES, {"input": [{"type": "function_call", "name": "a", "arguments": "x"}]}, "input", "JSON of an object"),
    (RESPONSES, {"input": [user("x")] * 1024, "instructions": "y"}, "input", "at most 1024 items"),
    (RESPONSES, {"tools": [FLAT]}, None, "takes no tools"),
    (RESPONSES, {"metadata": {f"x{entry}": [] for entry in range(1025)}}, "metadata", "more than 1024 entries"),
    (EMBEDDINGS, {"pooling": "max"}, "pooling", "'last' or 'mean'"),
    (EMBEDDINGS, {"input": [[5], "x", 7]}, "input", "expected token ids"),
    (TOKENIZE, {"prompt": None}, "prompt", "a prompt or messages, one of them"),
    (TOKENIZE, {"messages": MESSAGES}, "prompt", "a prompt or messages, one of them"),
    (TOKENIZE, {"prompt": None, "messages": []}, "messages", "at least 1 item"),
    (TOKENIZE, {"prompt": "a b" * 10_000}, "messages", "30000 letters are far over the 512 tokens"),
    (DETOKENIZE, {"tokens": [5, 300]}, None, "from 0 to 299"),
    (DETOKENIZE, {"tokens": [True]}, "tokens", "expected token ids"),
    (DETOKENIZE, {"tokens": [5] * 513}, None, "513 are more than the 512"),
]  # fmt: skip
OPENAIS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"messages": [*MESSAGES, {"role": "assistant", "audio": {"id": "a"}}]}, "messages.1.audio"),
    (COMPLETIONS, {"suffix": "y"}, "suffix"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (RESPONSES, {"include": ["reasoning.encrypted_content"]}, "include"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSES, {"truncation": "auto"}, "truncation"),
    (EMBEDDINGS, {"dimensions": 8}, "dimensions"),
]
INSIDE: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 5}, "best_of"),  # of completions
    ({"dash": {"bugdet": 0.9}}, "dash.bugdet"),
    ({"stream_options": {"usage": True}}, "stream_options.usage"),
    ({"messages": [*MESSAGES, user("a", text="b")]}, "messages.1.text"),
    ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params"),
    ({"response_format": FORM | {"schema": {}}}, "response_format.schema"),
]


def error(http: httpx.Client, path: str, changes: dict[str, Any]) -> dict[str, Any]:
    reply = http.post(path, json=ASKED[path] | changes)
    assert reply.status_code == (404 if changes.get("model") == "gpt" else 400), reply.text
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["param"] is None or found["message"].startswith(("There is no model", "The context", found["param"]))
    return found


@pytest.mark.parametrize("row", range(len(REFUSED)))
def test_what_is_refused(row: int, http: httpx.Client) -> None:
    path, changes, param, said = REFUSED[row]
    found = error(http, path, changes)
    assert (found["param"], said in found["message"]) == (param, True), found


def test_what_openai_has_and_this_server_has_not(http: httpx.Client) -> None:
    for path, given, field in OPENAIS:
        found = error(http, path, given)
        assert (found["param"], found["code"]) == (field, UNSUPPORTED)
        assert found["message"].startswith(f"{field}: OpenAI's API has this field, this server has not. Known: ")


@pytest.mark.parametrize("path", ASKED)
def test_an_unknown_field_is_refused_with_the_known_ones(path: str, http: httpx.Client) -> None:
    """A null asks for nothing, and neither does what changes no answer."""
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "guided_regexp": None}
    assert http.post(path, json=ASKED[path] | harmless).status_code == 200
    found = error(http, path, {"guided_regexp": "[0-9]+"})
    assert (found["type"], found["code"]) == ("invalid_request_error", UNKNOWN)
    assert found["message"].startswith("guided_regexp: there is no such field. Known: ")
    assert {*ASKED[path]} <= {*found["message"].rstrip(".").partition("Known: ")[2].split(", ")}


def test_inside_of_objects_too(http: httpx.Client) -> None:
    for given, field in INSIDE:
        found = error(http, CHAT, given)
        assert (found["param"], found["code"]) == (field, UNKNOWN)


@pytest.mark.parametrize(
    ("path", "given"),
    [
        (CHAT, {"modalities": ["text"], "verbosity": "medium", "functions": [], "audio": None, "top_logprobs": 0}),
        (CHAT, {"response_format": FORM | {"json_schema": {"name": "a", "strict": True, "schema": {}}}}),
        (CHAT, {"messages": [user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}])]}),
        (CHAT, dict.fromkeys(("n", "stream", "logprobs", "parallel_tool_calls", "tools", "tool_choice", "dash"))),
        (COMPLETIONS, {"suffix": "", "best_of": 1}),
        (COMPLETIONS, dict.fromkeys(("n", "stream", "best_of", "echo", "stream_options", "dash"))),
        (RESPONSES, {"include": [], "truncation": "disabled", "background": False, "reasoning": {}}),
        (RESPONSES, dict.fromkeys(("stream", "parallel_tool_calls", "background", "top_logprobs", "text", "dash"))),
        (RESPONSES, {"input": [{"id": "msg_1", "status": "completed", "type": "message", "role": "assistant",
                                "content": SAID}, *MESSAGES]}),
    ],
)  # fmt: skip
def test_what_asks_for_nothing(path: str, given: dict[str, Any], http: httpx.Client) -> None:
    """OpenAI's defaults, what its own clients send back, and null for what they leave open."""
    reply = http.post(path, json=ASKED[path] | given)
    assert reply.status_code == 200, reply.text


def test_what_is_no_number() -> None:
    for name in ("max_tokens", "n", "seed", "top_k", "temperature", "top_p", "presence_penalty"):
        for value in (True, "2"):
            with pytest.raises(ValidationError, match="expected a number"):
                ChatRequest.model_validate(ASKED[CHAT] | {name: value})
