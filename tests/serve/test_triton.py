"""Triton's model repository: its model on a stand-in for the backend, and on the real server where there is one."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.serve import triton
from tests.commands.helpers import DISK_FULL, done, free_port, refused
from tests.conftest import ROOT

FP32 = ("--target", "cpu-fp32")
SERVER, _, SITE = os.environ.get("DASH_EXPORT_TRITON", "").partition(":")
"""The folder that has bin/tritonserver, and one of packages for its Python (docs/serving.md)."""


@pytest.fixture
def repository(tiny_root: Path, tmp_path: Path) -> Path:
    models = tmp_path / "models"
    done("serve", tiny_root, *FP32, "--write-triton", models, "--rows", 2, "--waiting", 4)
    return models


@pytest.fixture
def expected(runtime: DashRuntime) -> str:
    return runtime.generate(runtime.text.encode("hello"), 9, policy="static", skip=[2, 3]).text


ASKED: dict[str, Any] = {"max_tokens": 9, "temperature": 0, "dash": {"skip": [2, 3]}}


class Sender:
    def __init__(self) -> None:
        self.sent: SimpleQueue[Any] = SimpleQueue()
        self.cancelled = False

    def send(self, response: Any, flags: int = 0) -> None:
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled

    def told(self) -> list[dict[str, str]]:
        """All responses to the last one: texts by name, or the error."""
        found = []
        while True:
            response, flags = self.sent.get(timeout=20)
            named = {tensor.name: tensor.array[0].decode() for tensor in response.output_tensors}
            found.append({"error": str(response.error)} if response.error else named)
            if flags:
                return found


@pytest.fixture
def ask(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sender]]:
    """`ask(text, sampling_parameters)` -> its sender, of the copied model on a stand-in for Triton's module."""
    backend = ModuleType("triton_python_backend_utils")
    backend.__dict__.update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        TritonError=str,
        Tensor=lambda name, array: SimpleNamespace(name=name, array=array, as_numpy=lambda: array),
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(
            output_tensors=output_tensors, error=error
        ),
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    scope: dict[str, Any] = {"__name__": "model"}
    code = (repository / "tiny" / "1" / "model.py").read_text()
    exec(compile(code, "model.py", "exec"), scope)
    config = (repository / "tiny" / "config.pbtxt").read_text()
    pairs = re.findall(r'key: "(\w+)" value: { string_value: "(.*)" }', config)
    parameters = {key: {"string_value": value} for key, value in pairs}
    model = scope["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})

    def asked(*texts: str) -> Sender:
        sender = Sender()
        arrays = {
            name: np.array([text.encode()], np.object_)
            for name, text in zip(("text_input", "sampling_parameters"), texts, strict=False)
        }
        inputs = {name: SimpleNamespace(as_numpy=lambda array=array: array) for name, array in arrays.items()}
        model.execute([SimpleNamespace(inputs=inputs, get_response_sender=lambda: sender)])
        return sender

    yield asked
    model.finalize()


def test_it_streams(ask: Callable[..., Sender], expected: str) -> None:
    told = ask("hello", json.dumps(ASKED)).told()
    assert "".join(one["text_output"] for one in told) == expected
    statistics = json.loads(told[-1]["statistics"])
    assert statistics["layers_per_token"] == 4
    assert (statistics["completion_tokens"], statistics["finish_reason"]) == (9, "length")
    assert all("statistics" not in one for one in told[:-1])


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (("hello", "{"), "Expecting property name"),
        (("hello", "[]"), "is not the JSON of an object"),
        (("hello", '{"max_tokens": 0}'), "max_tokens: 0 is for echo"),
        (("hello", '{"dash": {"budget": 7}}'), "budget"),
        (("hello", '{"n": 2}'), "n is not for Triton"),
        (("hello", "[" * 10_000), "recursion"),
        (("hello", "[" * 100_000), "more than"),
        ((), "prompt"),
    ],
)
def test_mistakes(ask: Callable[..., Sender], texts: tuple[str, ...], error: str) -> None:
    (told,) = ask(*texts).told()
    assert error in told["error"]


def test_a_client_that_goes_away(ask: Callable[..., Sender]) -> None:
    sender = ask("hello", json.dumps(ASKED | {"max_tokens": 400}))
    sender.cancelled = True
    assert json.loads(sender.told()[-1]["statistics"])["completion_tokens"] < 400


def test_nothing_is_written_over(tiny_root: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is there, what lies beside a name like `..`, a bundle; one that cannot be written whole is not."""
    serve = ("serve", tiny_root, *FP32, "--write-triton")
    assert "is there already" in refused(*serve, repository)
    assert "would lie inside the bundle" in refused(*serve, tiny_root / "onnx" / "models")
    assert "would lie inside the bundle" in refused(*serve, shutil.copytree(tiny_root, repository.parent / "own.dash"))
    for name in ("...dash", "a@b.dash"):
        assert "it is no name" in refused("serve", shutil.copytree(tiny_root, repository.parent / name), *FP32)
    assert "none of --budget" in refused(*serve, repository.with_name("other"), "--budget", 0.9)
    monkeypatch.setattr(triton, "write_atomic", Mock(side_effect=DISK_FULL))
    refused(*serve, repository, "--served-model-name", "other")
    assert {path.name for path in repository.iterdir()} == {"tiny"}


@pytest.mark.skipif(not SERVER, reason="set DASH_EXPORT_TRITON (docs/serving.md)")
def test_the_real_server(repository: Path, expected: str) -> None:
    port = free_port()
    command = [
        f"{SERVER}/bin/tritonserver", f"--model-repository={repository}", f"--backend-directory={SERVER}/backends",
        f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": f"{SITE}:{ROOT}"})
    address = f"http://127.0.0.1:{port}/v2"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{address}/models/tiny/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        body = {"text_input": "hello", "sampling_parameters": json.dumps(ASKED)}
        reply = httpx.post(f"{address}/models/tiny/generate_stream", json=body, timeout=60)
        told = [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line]
        assert "".join(one["text_output"] for one in told) == expected
        assert json.loads(told[-1]["statistics"])["layers_per_token"] == 4
        wrong = httpx.post(f"{address}/models/tiny/generate_stream", json=body | {"sampling_parameters": "{"})
        assert "Expecting property name" in wrong.text
    finally:
        process.terminate()
        process.wait(30)
