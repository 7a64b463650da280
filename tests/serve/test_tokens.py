"""Tokens of texts and texts of tokens, as vLLM's clients ask for them."""

from typing import Any

import httpx
import pytest

from dash_export import DashRuntime
from tests.serve.conftest import Serve
from tests.serve.test_app import MESSAGES


def test_there_and_back(http: httpx.Client, runtime: DashRuntime) -> None:
    text = "hello <|im_start|> there, \N{SNOWMAN}"
    said = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert said["tokens"] == runtime.text.encode(text)
    assert (said["count"], said["max_model_len"]) == (len(said["tokens"]), 512)
    assert said["token_strs"] == [runtime.text.tokenizer.id_to_token(one) for one in said["tokens"]]
    assert http.post("/detokenize", json={"tokens": said["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}])
def test_a_chat_is_read_as_its_answer_does(more: dict[str, Any], http: httpx.Client) -> None:
    body = {"messages": [*MESSAGES, {"role": "assistant", "content": "Well, "}]} | more
    count = http.post("/tokenize", json=body).json()["count"]
    assert http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"] == count


def test_a_key_is_needed(serve: Serve) -> None:
    address = serve(keys=["secret"])
    assert httpx.get(f"{address}/tokenizer_info").status_code == 401
    for path in ("tokenize", "detokenize", "v1/embeddings"):
        assert httpx.post(f"{address}/{path}", json={}).status_code == 401
    told = httpx.get(f"{address}/tokenizer_info", headers={"authorization": "Bearer secret"}).json()
    assert "<|im_start|>" in told["chat_template"]
    assert "eos_token" in told
