"""Embeddings of a text encoder over a real server: OpenAI's form, what is told, and hostile bodies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.serve.running import BODY_BYTES
from dash_export.serve.text_server import TextQueue, TextServer
from tests.commands.helpers import refused
from tests.commands.test_serve import served
from tests.listening import listening
from tests.tiny_encoder import encoder_bundle
from tests.tiny_texts import TEXTS

STATIC = {"policy": "static", "skip": [3, 4]}
A, DOT = 5, 15
"""Token ids of "a" and of "."; 2 and 3 are [CLS] and [SEP]."""


@pytest.fixture(scope="module")
def texts(text_root: Path) -> DashRuntime:
    return DashRuntime.load(text_root, "portable")


@pytest.fixture
def http(text_address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=text_address, timeout=30) as made:
        yield made


def unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


@pytest.mark.parametrize("dash", [{"policy": "dense"}, STATIC, {"policy": "token", "trade_off": 0.5}])
def test_by_openais_client(text_address: str, texts: DashRuntime, dash: dict[str, Any]) -> None:
    """More texts of a length than a batch has, others among them, in their order; base64 is asked for."""
    given = [*TEXTS, *TEXTS[::-1]]
    client = openai.OpenAI(base_url=f"{text_address}/v1", api_key="none", max_retries=0)
    said = client.embeddings.create(model="tiny", input=given, extra_body={"dash": dash})
    alone = [texts.encoder(**dash)(text) for text in given]
    pooled, actions = (np.concatenate([getattr(one, name) for one in alone]) for name in ("pooled", "actions"))
    np.testing.assert_allclose([one.embedding for one in said.data], unit(pooled), atol=1e-4)
    assert [one.index for one in said.data] == [*range(len(given))]
    for one, taken in zip(said.data, actions, strict=True):
        told = {"skipped_layers": np.flatnonzero(taken).tolist(), "layers": 5, "guarded": False}
        assert one.model_extra["dash"] == told  # type: ignore[index]
    tokens = sum(len(texts.encoder().processor.ids(text, "")) for text in given)
    assert said.usage.prompt_tokens == said.usage.total_tokens == tokens
    told = said.usage.model_extra["dash"]  # type: ignore[index]
    assert told.keys() == {"layers_per_text", "guarded", "encode_seconds", "time_of_dense"}
    assert told["layers_per_text"] == pytest.approx((actions == 0).sum(axis=1).mean(), abs=1e-3)


def test_a_text_alone_and_token_ids(http: httpx.Client, texts: DashRuntime) -> None:
    """Ids are taken as they are: with those of the special tokens, they are the text."""
    wanted = unit(texts.encoder()(["a ."]).pooled)[0]
    for given in ("a .", ["a ."], [2, A, DOT, 3], [[2, A, DOT, 3]]):
        said = http.post("/v1/embeddings", json={"input": given, "dash": {"policy": "dense"}}).json()
        np.testing.assert_allclose(said["data"][0]["embedding"], wanted, atol=1e-5)
        assert said["usage"]["prompt_tokens"] == 4
    mixed = http.post("/v1/embeddings", json={"input": [[A, DOT], "a ."], "model": "tiny@policy=dense"}).json()
    assert mixed["usage"]["prompt_tokens"] == 6
    np.testing.assert_allclose(mixed["data"][1]["embedding"], wanted, atol=1e-5)


WRONG: tuple[tuple[Any, int, str | None, str], ...] = (
    ({}, 400, "input", "Field required"),
    ({"input": None}, 400, "input", "Field required"),
    ({"input": ""}, 400, None, "Text 0 is empty: give at least one word."),
    ({"input": ["a", " \n"]}, 400, None, "Text 1 is empty"),
    ({"input": []}, 400, "input", "expected a text, or token ids, or a list of these"),
    ({"input": [[]]}, 400, "input", "expected a text, or token ids"),
    ({"input": ["a", 5]}, 400, "input", "expected token ids"),
    ({"input": [5, "a"]}, 400, "input", "expected token ids"),
    ({"input": [True]}, 400, "input", "expected token ids"),
    ({"input": [1.0]}, 400, "input", "expected token ids"),
    ({"input": {"text": "a"}}, 400, "input", "expected token ids"),
    ({"input": [{"text": "a"}]}, 400, "input", "expected token ids"),
    ({"input": 7}, 400, "input", "expected token ids"),
    ({"input": ["a"] * 1025}, 400, "input", "over 1024 prompts in one request"),
    ({"input": [18]}, 400, None, "Token ids must be from 0 to 17; got 18 to 18."),
    ({"input": [-1]}, 400, None, "Token ids must be from 0 to 17; got -1 to -1."),
    ({"input": [10**30]}, 400, None, "Token ids must be"),
    ({"input": ["a", "a " * 15]}, 400, "input", "Text 1 has 17 tokens, and 16 are the most: shorten or split it."),
    ({"input": [[A] * 17]}, 400, "input", "Text 0 has 17 tokens, and 16 are the most"),
    ({"input": "a" * 5000}, 400, "input", "Text 0 has 5000 letters, far over the 16 tokens that are the most"),
    ({"input": "a", "dimensions": 7}, 400, "dimensions", "this server has not"),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "pooling": "mean"}, 400, "pooling", "there is no such field"),
    ({"input": "a", "modality": "text"}, 400, "modality", "there is no such field"),
    ({"input": "a", "dash": {"skip": [3]}}, 400, None, "not whole units"),
    ({"input": "a", "dash": {"budget": 7}}, 400, None, "budget"),
    ({"input": "a", "model": "other"}, 404, "model", "There is no model 'other' here. Known: tiny."),
)


@pytest.mark.parametrize(("body", "status", "field", "message"), WRONG)
def test_hostile_bodies(http: httpx.Client, body: Any, status: int, field: str | None, message: str) -> None:
    reply = http.post("/v1/embeddings", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, field), error
    assert message in error["message"]
    if "the most" in message:
        assert error["code"] == "context_length_exceeded"


def test_bodies_that_are_no_json(http: httpx.Client) -> None:
    """Half a character, no JSON and too much of it. The server answers the next one."""
    for content, status in ((b'{"input": "\\ud800"}', 400), (b"{", 400), (b"[]", 400), (b" " * (BODY_BYTES + 1), 413)):
        reply = http.post("/v1/embeddings", content=content)
        assert reply.status_code == status, content[:20]
        assert reply.json()["error"]["message"]
    assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_paths_and_metrics(texts: DashRuntime) -> None:
    """There is no page: it is no use without a picture to show."""
    with (
        listening(TextServer({"tiny": TextQueue(texts)}).app) as address,
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        http.post("/v1/embeddings", json={"input": TEXTS, "dash": STATIC})
        http.post("/v1/embeddings", json={"input": ""})
        told = http.get("/metrics").text
        for name, count in (("requests_total{", 2), ("finished_total{", 1), ("failed_total{", 1)):
            assert f'dash_export_{name}model="tiny"}} {count}.0' in told
        assert f'dash_export_layers_total{{layer="3",model="tiny",state="skipped"}} {len(TEXTS)}.0' in told
        for path in ("/v1/chat/completions", "/tokenize", "/"):
            reply = http.get(path)
            assert reply.status_code == 404
            assert "Known: /v1/embeddings, /health" in reply.json()["error"]["message"]
        paths = {"/v1/embeddings", "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
        assert set(http.get("/openapi.json").json()["paths"]) == paths


def test_the_command(text_root: Path, tmp_path: Path) -> None:
    portable = ("--target", "portable")
    eye, names = encoder_bundle(tmp_path), ("--served-model-name", "words", "--served-model-name", "eye")
    assert "words is a text encoder, and others of these bundles are not" in refused(
        "serve", text_root, eye, *portable, *names
    )
    assert "words is an image encoder, and others" in refused("serve", eye, text_root, *portable, *names)
    assert "are of causal LMs" in refused("serve", text_root, *portable, "--ctx-size", "50")
    with served(text_root, "-m", "dash_export", options=(*portable, "--log")) as (address, process):
        said = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": TEXTS}, timeout=30)
        assert said.status_code == 200
        process.terminate()
        log = process.communicate(timeout=20)[1]
        assert process.returncode == 0
    assert f'"operation": "embeddings", "model": "tiny", "ended": "stop", "texts": {len(TEXTS)}' in log
    assert "fox" not in log
