"""Chats and completions beside `test_app.py`: what their answers say, and when their time begins."""

import re
import time
from typing import Any

import httpx
import openai
import pytest

from dash_export import DashRuntime
from dash_export.text.tokenizer import Text
from tests.serve.conftest import Serve
from tests.serve.test_app import DENSE, GREEDY, MESSAGES


def test_usage_says_what_was_known(client: openai.OpenAI) -> None:
    """Whole tiles of 16 tokens of an earlier prompt are not computed again, in any form of the API."""
    asked: dict[str, Any] = {"prompt": [*range(90, 30, -1)], "max_tokens": 2, "extra_body": DENSE} | GREEDY
    for known in (0, 48):
        usage = client.completions.create(**asked).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == known
    said = [
        client.responses.create(input="so it goes, " * 6, model="tiny", max_output_tokens=2, extra_body=DENSE).usage
        for _ in range(2)
    ]
    cached, tokens = said[1].input_tokens_details.cached_tokens, said[1].input_tokens  # type: ignore[union-attr]
    assert said[0].input_tokens_details.cached_tokens < cached == (tokens - 1) // 16 * 16  # type: ignore[union-attr]


def test_logprobs_are_of_the_answer(client: openai.OpenAI) -> None:
    """Not of the stop string after it."""
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "logprobs": True, "extra_body": DENSE} | GREEDY

    def said(**more: Any) -> tuple[list[str], str]:
        (choice,) = client.chat.completions.create(**asked, **more).choices
        assert choice.logprobs is not None
        return [entry.token for entry in choice.logprobs.content or []], choice.message.content or ""

    pieces, text = said()
    place = next(at for at, piece in enumerate(pieces) if at and piece.isascii() and piece not in pieces[:at])
    assert said(stop=[pieces[place]]) == (pieces[:place], text[: text.index(pieces[place])])


def test_time_begins_as_a_request_comes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is encoded within its deadline."""
    sound, address, body = Text.encode, serve(deadline=0.5), {"prompt": "hello", "max_tokens": 2}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
    monkeypatch.setattr(Text, "encode", lambda *given, **more: (time.sleep(0.6), sound(*given, **more))[1])
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 504


def test_several_prompts(client: openai.OpenAI, runtime: DashRuntime) -> None:
    """Texts or token ids, each with `n` answers, in their order; each prompt counts once."""
    prompts = ["hello", "there", "hello there"]
    for given in (prompts, [runtime.text.encode(one) for one in prompts]):
        reply = client.completions.create(prompt=given, max_tokens=6, n=2, extra_body=DENSE, **GREEDY)
        wanted = [runtime.generate(one, 6).text for one in prompts for _ in range(2)]
        assert [choice.text for choice in reply.choices] == wanted
        assert [choice.index for choice in reply.choices] == [*range(6)]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(len(runtime.text.encode(one)) for one in prompts)
        assert reply.usage.completion_tokens == 36
    pieces: dict[int, str] = {}
    for chunk in client.completions.create(prompt=prompts, max_tokens=6, stream=True, extra_body=DENSE, **GREEDY):
        pieces[chunk.choices[0].index] = pieces.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [pieces[at] for at in range(3)] == wanted[::2]


def test_seeds_are_of_the_answers_to_a_prompt(http: httpx.Client) -> None:
    body = {"prompt": ["hello", "hello"], "n": 2, "max_tokens": 8, "seed": 3, "temperature": 1.5} | DENSE
    texts = [choice["text"] for choice in http.post("/v1/completions", json=body).json()["choices"]]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_an_answer_of_one_token_has_no_speed(http: httpx.Client) -> None:
    """Its token comes from the prompt: no layers were decoded."""
    said = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}).json()["dash"]
    assert said.keys() == {"prefill_seconds"}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-c]/x"}, "[0-9]{3}-[a-c]/x"),
        ({"guided_json": {"enum": ["river", "lake"]}}, '"river"|"lake"'),
        ({"guided_json": '{"enum": ["river", "lake"]}'}, '"river"|"lake"'),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
    ],
)
def test_guided(path: str, given: dict[str, Any], pattern: str, http: httpx.Client) -> None:
    """The names are vLLM's."""
    asked = {"prompt": "hello"} if path == "completions" else {"messages": MESSAGES}
    body = asked | given | {"max_tokens": 30, "temperature": 2, "n": 3}
    for choice in http.post(f"/v1/{path}", json=body).json()["choices"]:
        assert re.fullmatch(pattern, choice["text"] if path == "completions" else choice["message"]["content"])
        assert choice["finish_reason"] == "stop"


def test_logit_bias(client: openai.OpenAI, runtime: DashRuntime) -> None:
    (letter,) = runtime.text.encode("e")
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 6, "extra_body": DENSE} | GREEDY
    assert client.completions.create(logit_bias={str(letter): 100}, **asked).choices[0].text == "eeeeee"
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(logit_bias={str(letter): -100}, **asked).choices[0].text == plain
    first = int(runtime.session().prefill(runtime.text.encode("hello")).argmax())
    assert client.completions.create(logit_bias={str(first): -100}, **asked).choices[0].text != plain


@pytest.mark.parametrize("said", ["Well", "Well, ", "Well\n\n"])
def test_the_last_message_is_continued(said: str, client: openai.OpenAI, runtime: DashRuntime) -> None:
    messages: Any = [*MESSAGES, {"role": "assistant", "content": said}]
    body = {"continue_final_message": True, "add_generation_prompt": False, **DENSE}
    reply = client.chat.completions.create(messages=messages, max_tokens=9, extra_body=body, **GREEDY)
    assert runtime.text.template is not None
    prompt = runtime.text.template.render(MESSAGES) + said
    ids = runtime.text.encode(prompt, special=False)
    assert reply.choices[0].message.content == runtime.generate(ids, 9).text
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)
