"""What people ask a server with, each of SmolLM2. LangChain and LiteLLM: pip install 'dash-export[clients]'. Where
'ray[serve]' is installed, each asks a cluster, too.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import openai
import pytest

from dash_export import DashRuntime
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Scheduler
from tests.listening import listening
from tests.serve.ray_cluster import on_ray

pytestmark = pytest.mark.model

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 12
SCHEMA = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"]}
DENSE = {"dash": {"policy": "dense"}}


@pytest.fixture(scope="module")
def runtime(smollm2_runtime: Callable[..., DashRuntime]) -> DashRuntime:
    return smollm2_runtime("cpu-fp32")


@pytest.fixture(scope="module", params=["server", "ray"])
def url(runtime: DashRuntime, smollm2_bundle: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of ours, and two replicas on two nodes of a Ray cluster."""
    alone = Server({"smollm2": Scheduler(runtime, rows=2)}, drain=5.0).app
    with listening(alone) if request.param == "server" else on_ray(smollm2_bundle) as found:
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def dense(runtime: DashRuntime) -> str:
    return "".join(step.text for step in runtime.chat(MESSAGES, TOKENS, policy="dense"))


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_openai(client: openai.OpenAI, runtime: DashRuntime, dense: str) -> None:
    """Whole, streamed, as a response, with likelihoods, and fewer layers where asked."""
    asked: dict[str, Any] = {"model": "smollm2", "temperature": 0, "extra_body": {"dash": {"policy": "dense"}}}
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=TOKENS, logprobs=True, top_logprobs=2, **asked)
    choice = reply.choices[0]
    assert choice.message.content == dense
    assert "Paris" in dense
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(one.token for one in choice.logprobs.content) == dense
    chunks = client.chat.completions.create(messages=MESSAGES, max_tokens=TOKENS, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == dense
    assert client.responses.create(input=MESSAGES, max_output_tokens=TOKENS, **asked).output_text == dense
    prompt = runtime.text.chat(MESSAGES)
    plain = client.completions.create(prompt=np.array(prompt).tolist(), max_tokens=TOKENS, **asked)
    assert plain.choices[0].text == dense
    fewer = client.chat.completions.create(messages=MESSAGES, max_tokens=32, model="smollm2@skipped=4", temperature=0)
    assert fewer.model_extra is not None
    assert fewer.model_extra["dash"]["layers_per_token"] < 29


def test_structured_output(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA}}
    reply = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_tokens=60, response_format=schema, extra_body=DENSE
    )  # dense: what is skipped otherwise, and so the answer's length, follows from the costs that were measured
    assert isinstance(json.loads(reply.choices[0].message.content or "")["capital"], str)


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
def test_curl(url: str, dense: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, "dash": {"policy": "dense"}}
    command = ["curl", "-sS", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(found.stdout)["choices"][0]["message"]["content"] == dense


def test_langchain(url: str, dense: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="pip install 'dash-export[clients]'")
    model = langchain.ChatOpenAI(
        base_url=url, api_key="none", model="smollm2", temperature=0, max_tokens=TOKENS,
        extra_body={"dash": {"policy": "dense"}},
    )  # fmt: skip
    reply = model.invoke("What is the capital of France?")
    assert reply.content == dense
    assert reply.response_metadata["token_usage"]["dash"]["layers_per_token"] == 30
    assert "".join(chunk.content for chunk in model.stream("What is the capital of France?")) == dense


def test_litellm(url: str, dense: str) -> None:
    litellm = pytest.importorskip("litellm", reason="pip install 'dash-export[clients]'")
    asked = {
        "model": "openai/smollm2", "api_base": url, "api_key": "none", "messages": MESSAGES, "temperature": 0,
        "max_tokens": TOKENS, "extra_body": {"dash": {"policy": "dense"}},
    }  # fmt: skip
    reply = litellm.completion(**asked)
    assert reply.choices[0].message.content == dense
    assert reply.dash["layers_per_token"] == 30
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == dense
