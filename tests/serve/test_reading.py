"""Prompts of which something is wanted: their log-likelihoods by `echo`, and what they are without an answer."""

from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.runtime import scoring
from tests.serve.test_app import DENSE, GREEDY
from tests.tiny import log_softmax, random_ids

COMPLETIONS, PARTS = "/v1/completions", ("tokens", "text_offset")


@pytest.mark.parametrize("count", [2, 40, 150, 129])
def test_echo_gives_what_score_gives(count: int, http: httpx.Client, runtime: DashRuntime) -> None:
    """Of several passes, too, the last of which never has one token alone. What is known is read again."""
    ids = random_ids(count, seed=count)
    body = {"prompt": ids.tolist(), "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    plain = http.post(COMPLETIONS, json=body | {"echo": False, "max_tokens": 3} | DENSE).json()["choices"][0]
    scored = runtime.session().score(ids, keep_logits=True)
    for _ in range(2):
        told = http.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
        assert len(told["tokens"]) == count + 1
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        np.testing.assert_allclose(told["token_logprobs"][1:-1], scored.log_likelihoods, atol=1e-3)
        best = log_softmax(scored.logits).max(axis=-1)[:-1]  # type: ignore[arg-type]
        np.testing.assert_allclose([max(top.values()) for top in told["top_logprobs"][1:-1]], best, atol=1e-3)
        assert told["token_logprobs"][-1] == pytest.approx(plain["logprobs"]["token_logprobs"][0], abs=1e-3)
    assert http.post(COMPLETIONS, json=body | {"echo": False, "max_tokens": 3} | DENSE).json()["choices"][0] == plain


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_is_before_the_answer(stream: bool, client: openai.OpenAI, runtime: DashRuntime) -> None:
    """With or without likelihoods, whose offsets are places in the whole text."""
    alone = runtime.generate("hello there", 9).text
    asked: dict[str, Any] = {"prompt": "hello there", "max_tokens": 9, "echo": True, "extra_body": DENSE} | GREEDY
    for more in ({}, {"logprobs": 2}):
        reply: Any = client.completions.create(stream=stream, **asked, **more)
        chunks = list(reply) if stream else [reply]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == f"hello there{alone}"
        if more:
            told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
            pieces, places = ([one for part in told for one in getattr(part, name)] for name in PARTS)
            assert len(pieces) == len(places) == len(runtime.text.encode("hello there")) + 9
            for piece, place in zip(pieces, places, strict=True):
                assert "\N{REPLACEMENT CHARACTER}" in piece or text[place:].startswith(piece)


def test_an_answer_that_ends_at_once(http: httpx.Client, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token is told too: lm-eval takes the last one for the answer's, and all before for the prompt's."""
    ids = runtime.text.encode("hello there")
    last = int(runtime.session().prefill(ids).argmax())
    monkeypatch.setattr(runtime.text, "eos_ids", frozenset({last}))
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = http.post(COMPLETIONS, json=body).json()["choices"]
    assert (choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("stop", len(ids) + 1)
    assert choice["text"] == "hello there"


def test_nothing_but_the_prompt(http: httpx.Client) -> None:
    body = {"prompt": "hello there", "max_tokens": 0, "echo": True, "logprobs": 1}
    said = http.post(COMPLETIONS, json=body).json()
    assert said["choices"][0]["text"] == "hello there"
    assert len(said["choices"][0]["logprobs"]["tokens"]) == said["usage"]["prompt_tokens"]
    assert said["usage"]["completion_tokens"] == 0
    reply = http.post(COMPLETIONS, json=body | {"echo": False})
    assert "max_tokens: 0 is for echo" in reply.json()["error"]["message"]


@pytest.mark.parametrize("more", [{"dash": {"skip": [2, 3]}}, {"model": "tiny@policy=token,trade_off=0.4"}])
def test_a_prompt_is_dense(more: dict[str, Any], http: httpx.Client) -> None:
    """So its likelihoods say nothing of another setting."""
    body = {"prompt": "hello there", "max_tokens": 1, "echo": True}
    assert http.post(COMPLETIONS, json=body | more).status_code == 200
    reply = http.post(COMPLETIONS, json=body | more | {"logprobs": 1})
    assert reply.status_code == 400
    assert "a prompt is dense" in reply.json()["error"]["message"]
    for dense in (DENSE, {"model": "tiny@policy=dense"}):
        assert http.post(COMPLETIONS, json=body | dense | {"logprobs": 1}).status_code == 200


def test_token_by_token(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As engines read that cannot mix rows: those of a GPU."""
    ids, wanted = random_ids(20), runtime.session().score(random_ids(20), keep_logits=True).logits
    monkeypatch.setattr(runtime.engines, "mixes", False)
    session = runtime.session()
    assert scoring.read_length(session, 20) == 1
    found = [scoring.read(session, ids[at : at + 1]).logits[0, 0].copy() for at in range(20)]
    np.testing.assert_allclose(found, wanted, atol=1e-3)  # type: ignore[arg-type]
    assert session.tokens == ids.tolist()
