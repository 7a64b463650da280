"""Embeddings: final states, as the runtime gives them."""

import base64
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.serve.pooled import listed_vectors
from tests.serve.conftest import Serve
from tests.tiny import random_ids


def states(runtime: DashRuntime, ids: Any) -> np.ndarray:
    """Final states [n, hidden] of tokens, each as the last one of a prompt."""
    found = []
    for size in range(1, len(ids) + 1):
        session = runtime.session()
        session.prefill(np.asarray(ids[:size]))
        found.append(session.hidden)
    return np.array(found, np.float64)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_the_runtime(pooling: str, client: openai.OpenAI, runtime: DashRuntime) -> None:
    """By OpenAI's client, which asks for base64; more texts than rows, in their order, each of length 1."""
    prompts = [random_ids(size, seed=size).tolist() for size in (5, 1, 17, 3, 9)]
    said = client.embeddings.create(model="tiny", input=prompts, extra_body={"pooling": pooling})
    assert [one.index for one in said.data] == [*range(5)]
    assert said.usage.prompt_tokens == said.usage.total_tokens == 35
    for ids, one in zip(prompts, said.data, strict=True):
        each = states(runtime, ids)
        wanted = each[-1] if pooling == "last" else each.mean(axis=0)
        np.testing.assert_allclose(one.embedding, wanted / np.linalg.norm(wanted), atol=1e-4)


def test_forms(http: httpx.Client) -> None:
    body = {"input": "hello there, " * 30}  # of several passes, and known in part
    plain = http.post("/v1/embeddings", json=body).json()
    coded = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(np.array(plain["data"][0]["embedding"], np.float32), vector)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_vector_of_zeros_stays_one() -> None:
    listed = listed_vectors([np.zeros(3, np.float32), np.array([3.0, 0.0, 4.0], np.float32)], "float")
    assert [one["embedding"] for one in listed] == [[0, 0, 0], pytest.approx([0.6, 0, 0.8])]


def test_a_queue_of_one(serve: Serve) -> None:
    """Is enough for many texts, which wait outside of it."""
    reply = httpx.post(f"{serve(rows=3, waiting=1)}/v1/embeddings", json={"input": ["a", "b", "c", "d"]}, timeout=30)
    assert len(reply.json()["data"]) == 4


def test_a_build_without_states(
    http: httpx.Client, tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_runtime().engines, "gives_state", False)
    reply = http.post("/v1/embeddings", json={"input": "x"})
    assert reply.status_code == 400
    assert "tiny gives no states" in reply.json()["error"]["message"]
