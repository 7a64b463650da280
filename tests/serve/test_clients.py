"""What people ask a server with. LangChain and LiteLLM: pip install 'dash-export[clients]'. Where 'ray[serve]' is
installed, each asks a cluster, too.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import openai
import pytest

from dash_export import DashRuntime
from tests.serve.test_app import DENSE, GREEDY, MESSAGES
from tests.serve.test_ray import on_ray

TOKENS = 12


@pytest.fixture(scope="module", params=["server", "ray"])
def url(tiny_root: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of ours, and two replicas on two nodes of a Ray cluster."""
    if request.param == "server":
        yield f"{request.getfixturevalue('address')}/v1"
    else:
        with on_ray(tiny_root) as found:
            yield f"{found}/v1"


@pytest.fixture(scope="module")
def dense(tiny_runtime: Callable[..., DashRuntime]) -> str:
    return "".join(step.text for step in tiny_runtime().chat(MESSAGES, TOKENS, policy="dense"))


def test_openai(url: str, dense: str) -> None:
    """Whole, streamed, and as a response."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"extra_body": DENSE} | GREEDY
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=TOKENS, **asked)
    assert reply.choices[0].message.content == dense
    chunks = client.chat.completions.create(messages=MESSAGES, max_tokens=TOKENS, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == dense
    assert client.responses.create(input=MESSAGES, max_output_tokens=TOKENS, **asked).output_text == dense


@pytest.mark.skipif(which("curl") is None, reason="curl is not installed")
def test_curl(url: str, dense: str) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": TOKENS} | GREEDY | DENSE)
    command = ["curl", "-sS", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(found.stdout)["choices"][0]["message"]["content"] == dense


def test_langchain(url: str, dense: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="pip install 'dash-export[clients]'")
    model = langchain.ChatOpenAI(base_url=url, api_key="none", max_tokens=TOKENS, extra_body=DENSE, **GREEDY)
    reply = model.invoke(MESSAGES)
    assert reply.content == dense
    assert reply.response_metadata["token_usage"]["dash"]["layers_per_token"] == 6
    assert "".join(chunk.content for chunk in model.stream(MESSAGES)) == dense


def test_litellm(url: str, dense: str) -> None:
    litellm = pytest.importorskip("litellm", reason="pip install 'dash-export[clients]'")
    asked: dict[str, Any] = {"api_base": url, "api_key": "none", "messages": MESSAGES, "max_tokens": TOKENS}
    asked |= GREEDY | {"model": "openai/tiny", "extra_body": DENSE}
    reply = litellm.completion(**asked)
    assert reply.choices[0].message.content == dense
    assert reply.dash["layers_per_token"] == 6
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == dense
