"""OpenAI's API, by OpenAI's client and by hand, over a real server."""

import json
import logging
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.core.units import unit_skips
from dash_export.serve import metrics
from dash_export.serve.app import Server
from dash_export.serve.running import BODY_BYTES
from tests.listening import listening
from tests.serve.conftest import MakeScheduler, Serve, slow_down

MESSAGES: Any = [{"role": "user", "content": "hello there"}]
GREEDY: dict[str, Any] = {"temperature": 0, "model": "tiny"}
DENSE = {"dash": {"policy": "dense"}}


def expected(runtime: DashRuntime, tokens: int, messages: Any = MESSAGES, **setting: Any) -> str:
    return "".join(step.text for step in runtime.chat(messages, tokens, **setting))


def test_a_chat(client: openai.OpenAI, runtime: DashRuntime) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=12, extra_body=DENSE, **GREEDY)
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(runtime, 12)
    assert choice.finish_reason == "length"
    assert reply.model == "tiny"
    assert reply.usage is not None
    prompt = len(runtime.text.chat(MESSAGES))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, 12)
    assert reply.usage.total_tokens == prompt + 12
    told = reply.model_extra["dash"]  # type: ignore[index]
    assert told["layers_per_token"] == 6.0
    assert told["time_of_dense"] == 1.0
    assert reply.usage.model_extra["dash"] == told  # type: ignore[index]


@pytest.mark.parametrize("how", ["field", "alias"])
def test_how_much_is_skipped(how: str, client: openai.OpenAI, runtime: DashRuntime) -> None:
    given: dict[str, Any] = {"model": "tiny@policy=static,skip=2-3" if how == "alias" else "tiny"}
    body = {"dash": {"skip": [2, 3]}} if how == "field" else {}
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=9, temperature=0, extra_body=body, **given)
    assert reply.choices[0].message.content == expected(runtime, 9, policy="static", skip=(2, 3))
    assert reply.model_extra["dash"]["layers_per_token"] == 4.0  # type: ignore[index]
    assert reply.model_extra["dash"]["time_of_dense"] < 1  # type: ignore[index]


def test_the_time_of_an_answer_has_what_asking_the_policy_takes(
    client: openai.OpenAI, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; on a CPU asking takes nothing of its own, so the cost table is changed."""
    steps = list(runtime.chat(MESSAGES, 9, policy="token", skipped=1.5))[1:]
    skips = unit_skips(np.array([step.actions for step in steps]), runtime.bundle.manifest.policy.units)
    expected_time = 0.05 + runtime.cost.token_time(skips).mean()
    monkeypatch.setattr(DashRuntime, "cost", property(lambda its: replace(its.build.cost, asks=0.05)))
    body = {"dash": {"policy": "token", "skipped": 1.5}}
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=9, extra_body=body, **GREEDY)
    assert reply.model_extra["dash"]["time_of_dense"] == pytest.approx(expected_time, abs=1e-4)  # type: ignore[index]


def test_a_streamed_chat(client: openai.OpenAI, runtime: DashRuntime) -> None:
    """The first chunk has the role only, the last before the usage a reason and no text, the usage no choices."""
    stream = client.chat.completions.create(
        messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True},
        extra_body={"dash": {"skip": [4], "skips": True}}, **GREEDY,
    )  # fmt: skip
    first, *middle, last, usage = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == expected(runtime, 12, skip=(4,))
    assert last.choices[0].finish_reason == "length"
    assert not last.choices[0].delta.content
    assert [chunk.choices[0].finish_reason for chunk in middle] == [None] * len(middle)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    skips = [chunk.model_extra["dash"]["skipped_layers"] for chunk in middle]  # type: ignore[index]
    assert skips[0] == [], "the first token comes out of the prompt"
    assert skips[1:] == [[4]] * (len(skips) - 1)


def test_completions(client: openai.OpenAI, runtime: DashRuntime) -> None:
    wanted = runtime.generate("hello", 8).text
    reply = client.completions.create(prompt="hello", max_tokens=8, extra_body=DENSE, logprobs=2, **GREEDY)
    assert reply.choices[0].text == wanted
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.tokens or []) == 8
    stream = client.completions.create(prompt=[104, 101], max_tokens=8, stream=True, extra_body=DENSE, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == runtime.generate([104, 101], 8).text
    whole = reply.choices[0].logprobs
    chunks = list(
        client.completions.create(prompt="hello", max_tokens=8, extra_body=DENSE, logprobs=2, stream=True, **GREEDY)
    )
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens or []] == whole.tokens


def test_logprobs(client: openai.OpenAI, runtime: DashRuntime) -> None:
    reply = client.chat.completions.create(
        messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, extra_body=DENSE, **GREEDY
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    logits = runtime.session().prefill(runtime.text.chat(MESSAGES)).astype(np.float64)
    best = np.sort(logits - np.logaddexp.reduce(logits))[::-1][:3]
    np.testing.assert_allclose([entry.logprob for entry in content[0].top_logprobs], best, atol=1e-4)
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    assert len(content) == 5


def test_a_streamed_chat_tells_every_token_once(client: openai.OpenAI) -> None:
    """Also of a last one that is half a letter."""
    asked: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, "extra_body": {"dash": {"skips": True}}}
    for size in (1, 7):
        chunks = list(client.chat.completions.create(max_tokens=size, stream=True, **asked, **GREEDY))
        told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        assert sum(len(one.content or ()) for one in told) == size
        assert sum("dash" in (chunk.model_extra or {}) for chunk in chunks) == size


def test_speed_of_answers_that_wait_for_each_other(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers through one row are no faster than one."""
    slow_down(0.005, monkeypatch)
    body = {"prompt": "hello", "n": 4, "max_tokens": 20, "temperature": 0} | DENSE
    told = httpx.post(f"{serve(rows=1)}/v1/completions", json=body).json()["dash"]["tokens_per_second"]
    assert 0 < told < 1 / 0.005


def test_what_is_no_request(http: httpx.Client) -> None:
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b"x" * (BODY_BYTES + 1), 413)):
        reply = http.post("/v1/chat/completions", content=body)
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert http.get("/health").json() == {"status": "ok"}


def test_a_key(serve: Serve) -> None:
    """Of any letters."""
    for key in ("geheimnis-\u00fc", "secret"):
        address = serve(keys=["another", key])
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        for given, status in ((key, 200), ("wrong", 401), (key[:-1], 401), (f"{key}s", 401), ("geheimnis-u", 401)):
            reply = httpx.get(f"{address}/v1/models", headers={"authorization": f"Bearer {given}".encode()})
            assert reply.status_code == status
        for form, status in (("bearer ", 200), ("BEARER  ", 200), ("", 401), ("Basic ", 401), ("Bearer", 401)):
            reply = httpx.get(f"{address}/v1/models", headers={"authorization": f"{form}{key}".encode()})
            assert reply.status_code == status, form
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_several_models(scheduler: MakeScheduler) -> None:
    """A request says which."""
    served = {name: scheduler(False, rows=1) for name in ("one", "other")}
    with listening(Server(served, drain=5.0).app) as address, httpx.Client(base_url=address, timeout=30) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["one", "other"]
        assert http.get("/v1/models/car").json()["error"]["code"] == "model_not_found"
        for name, status in (("other", 200), ("", 404), ("car", 404)):
            reply = http.post("/v1/completions", json={"model": name, "prompt": [1, 2], "max_tokens": 1})
            assert reply.status_code == status
            assert reply.json()["model"] == name if status == 200 else "Known: one, other." in reply.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away(
    stream: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its answer ends, long before its last token, and the next one has the row. The log says so."""
    caplog.set_level(logging.INFO, metrics.log.name)
    slow_down(0.01, monkeypatch)
    address = serve(rows=1)
    body = {"messages": MESSAGES, "max_tokens": 450, "stream": stream, **DENSE, **GREEDY}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=0.001))
    until = time.monotonic() + 10
    while 'dash_export_running{model="tiny"} 0.0' not in (text := httpx.get(f"{address}/metrics").text):
        assert time.monotonic() < until, text
    later = httpx.post(f"{address}/v1/chat/completions", json=body | {"max_tokens": 3, "stream": False})
    assert later.status_code == 200
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    told = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert told['dash_export_tokens_total{model="tiny"}'] < 300
    logged = [json.loads(record.message)["ended"] for record in caplog.records if record.name == metrics.log.name]
    assert logged == ["cancelled", "length"]
    ended = [told[f'dash_export_{name}_total{{model="tiny"}}'] for name in ("finished", "failed", "cancelled")]
    assert ended == [1, 0, 1]
    asked = 'error_type="cancelled",gen_ai_operation_name="chat",gen_ai_request_model="tiny"'
    assert told[f"gen_ai_server_request_duration_seconds_sum{{{asked}}}"] > 0


def test_an_error_in_the_middle_of_a_stream(serve: Serve) -> None:
    address = serve(deadline=0.01)
    body = {"messages": MESSAGES, "max_tokens": 450, "stream": True, **DENSE, **GREEDY}
    lines = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert "time that this request had is over" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]


def test_metrics(serve: Serve) -> None:
    """What is told of an answer of 140 tokens."""
    address, body = serve(), {"messages": MESSAGES, "max_tokens": 140, "dash": {"skip": [2, 3]}, **GREEDY}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    asked = 'gen_ai_operation_name="chat",gen_ai_request_model="tiny"'
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#")
    told = {name: float(value) for name, value in lines.items()}
    assert told['dash_export_tokens_total{model="tiny"}'] == 140
    assert told['dash_export_requests_total{model="tiny"}'] == 1
    assert told['dash_export_waiting{model="tiny"}'] == 0
    assert told['dash_export_layers_total{layer="2",model="tiny",state="skipped"}'] == 139
    assert told['dash_export_layers_total{layer="1",model="tiny",state="run"}'] == 139
    assert told['dash_export_layers_total{layer="2",model="tiny",state="run"}'] == 0
    duration = told[f'gen_ai_server_request_duration_seconds_sum{{error_type="",{asked}}}']
    first = told[f"gen_ai_server_time_to_first_token_seconds_sum{{{asked}}}"]
    token = told[f"gen_ai_server_time_per_output_token_seconds_sum{{{asked}}}"]
    assert 0 < first < duration
    assert duration == pytest.approx(first + 139 * token, rel=1e-6)


@pytest.mark.parametrize(
    ("path", "kind"), [("", "html"), ("page.css", "css"), ("page.js", "javascript"), ("parts.js", "javascript")]
)
def test_the_page(http: httpx.Client, path: str, kind: str) -> None:
    reply = http.get(f"/{path}")
    assert reply.headers["content-type"].startswith(f"text/{kind}")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert "http://" not in reply.text
    assert "https://" not in reply.text
