"""Damaged requests to a server: each is answered or refused, by no answer of 500 and no traceback, and the server
serves on.

    python tools/attack/bodies.py my.dash --bodies 10000
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import click
import httpx
from shared import finish, serving

from tests.fuzz.mutators import damaged, in_json

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}}, "required": ["a"]}
CALL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": SCHEMA}}
CHATS: list[dict[str, Any]] = [
    {"messages": MESSAGES, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "stop": ["a", "b"]},
    {"messages": MESSAGES, "dash": {"trade_off": 0.5, "skips": True}, "frequency_penalty": 0.1},
    {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    {"messages": [*MESSAGES, {"role": "assistant", "content": "Well"}], "continue_final_message": True},
    {"messages": MESSAGES, "tools": [CALL], "tool_choice": "auto", "parallel_tool_calls": False},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Hello", "echo": False, "logprobs": 1},
    {"prompt": [1, 2, 3], "dash": {"policy": "token", "skipped": 1}},
    {"prompt": ["Hello", "Hi"], "echo": True, "logprobs": 1, "logit_bias": {"5": 2.0}, "ignore_eos": True},
    {"prompt": "Hello", "guided_regex": "[0-9]{2}", "n": 2},
    {"prompt": "Hello", "guided_json": SCHEMA},
    {"prompt": "Hello", "guided_grammar": 'start: "yes" | "no"'},
]
RESPONSES: list[dict[str, Any]] = [
    {"input": "Hello", "instructions": "Be short."},
    {"input": MESSAGES[1:], "stream": True, "tools": []},
]
OTHERS: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [{"input": ["Hello", "Hi"], "pooling": "mean", "encoding_format": "base64"}, {"input": [1, 2]}],
    "/tokenize": [
        {"prompt": "Hello", "return_token_strs": True},
        {"messages": MESSAGES, "add_generation_prompt": False},
    ],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
PATIENCE = 60.0
LATE = 504
"""Answer to a body that asks for more tokens than this machine decodes before the deadline."""
JSON = {"Content-Type": "application/json"}


def seeds(model: str) -> dict[str, list[bytes]]:
    """Return sound bodies by path, with a few tokens each."""
    found = {"/v1/chat/completions": CHATS, "/v1/completions": COMPLETIONS, "/v1/responses": RESPONSES, **OTHERS}
    few: dict[str, dict[str, int]] = {"/v1/responses": {"max_output_tokens": 2}} | {path: {} for path in OTHERS}
    return {
        path: [json.dumps({"model": model} | few.get(path, {"max_tokens": 2}) | body).encode() for body in bodies]
        for path, bodies in found.items()
    }


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--bodies", default=10_000, show_default=True)
def main(bundle: Path, target: str, bodies: int) -> None:
    """Send damaged bodies one after the other, and a sound one after every hundred."""
    rng, statuses, faults = Random(bodies), Counter[str](), list[str]()
    with (
        tempfile.TemporaryFile("w+") as told,
        serving(bundle, target, "--deadline", "20", output=told) as (address, process),
        httpx.Client(base_url=address, timeout=PATIENCE) as client,
    ):
        sound = {  # which others are depends on the model: not every chat template takes tools
            path: [body for body in known if client.post(path, content=body, headers=JSON).status_code == 200]
            for path, known in seeds(client.get("/v1/models").json()["data"][0]["id"]).items()
        }
        for number in range(bodies):
            path = rng.choice([*sound])
            body = damaged(rng, sound[path], in_json)
            try:
                status = client.post(path, content=body, headers=JSON).status_code
            except httpx.HTTPError as error:
                status = 0
                faults.append(f"{path}: {error!r}: {body!r:.500}")
            statuses[str(status)] += 1
            if status >= 500 and status != LATE:
                faults.append(f"{path}: {status}: {body!r:.500}")
            if number % 100 == 0 and client.post(path, content=sound[path][0], headers=JSON).status_code != 200:
                faults.append(f"{path}: a sound body is refused after {number}")
        process.terminate()
        process.wait(PATIENCE)
        told.seek(0)
        faults += [line for line in told.read().splitlines() if "Traceback" in line]
    finish("bodies", faults, done=statuses)


if __name__ == "__main__":
    main()
