"""A bundle as a model of Triton's Python backend, streaming (decoupled). `dash-export serve --write-triton` copies this
file into a model repository, beside its config.pbtxt; it runs where `dash_export` can be imported.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

# Some builds of the backend ignore PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

import numpy as np  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from dash_export import DashError, DashRuntime  # noqa: E402
from dash_export.errors import RequestError  # noqa: E402
from dash_export.runtime.results import Response  # noqa: E402
from dash_export.serve.http_errors import HttpError, http_error, wrong_field  # noqa: E402
from dash_export.serve.messages import check_parts  # noqa: E402
from dash_export.serve.protocol import CompletionRequest  # noqa: E402
from dash_export.serve.scheduler import Scheduler  # noqa: E402
from dash_export.serve.tickets import Request, Ticket  # noqa: E402


class TritonPythonModel:
    """A bundle as a streaming model. Inputs: `text_input`, and `sampling_parameters`: JSON of the other fields of
    /v1/completions, `dash` too. Outputs: `text_output` in pieces, and `statistics` with the last piece. A request that
    its client cancels is ended.
    """

    def initialize(self, given: dict[str, str]) -> None:
        said = {name: value["string_value"] for name, value in json.loads(given["model_config"])["parameters"].items()}
        runtime = DashRuntime.load(said["bundle"], said["target"])
        self._scheduler = Scheduler(runtime, rows=int(said["rows"]), waiting=int(said["waiting"]))
        self._scheduler.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(_asked(request), sender)
            except DashError as error:
                _fail(sender, str(http_error(error)))
            except (HttpError, ValueError, RecursionError) as error:  # json's errors are ValueErrors
                _fail(sender, str(error))

    def finalize(self) -> None:
        self._scheduler.close(5)

    def _submit(self, asked: CompletionRequest, sender: Any) -> None:
        # The scheduler's thread may call `_tell` before `submit` returns the ticket: `_tell` looks for it in this list.
        tickets: list[Ticket] = []
        sampling = replace(asked.sampling(), grammar=asked.grammar(self._scheduler.runtime.text.tokenizer))
        submitted = Request(asked.prompt[0], asked.max_tokens, sampling, asked.dash.setting())
        tickets.append(self._scheduler.submit(submitted, partial(self._tell, sender, tickets)))

    def _tell(self, sender: Any, tickets: list[Ticket], response: Response) -> None:
        if response.error is not None:
            _fail(sender, str(http_error(response.error)))
            return
        outputs = [_tensor("text_output", response.text)]
        if response.finish_reason is None:
            sender.send(triton.InferenceResponse(outputs))
            if tickets and sender.is_cancelled():
                self._scheduler.cancel(tickets[0])
            return
        said = response.statistics
        statistics = {
            "finish_reason": response.finish_reason,
            "prompt_tokens": said.prompt_tokens,
            "completion_tokens": said.tokens,
        }
        if said.decode_steps:
            statistics |= {"layers_per_token": said.layers_per_token, "tokens_per_second": said.tokens_per_second}
        last = triton.InferenceResponse([*outputs, _tensor("statistics", json.dumps(statistics))])
        sender.send(last, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _asked(request: Any) -> CompletionRequest:
    """Return the request's inputs as a completion request. Raises ValueError, RequestError and HttpError."""
    given = _text(request, "sampling_parameters") or "{}"
    check_parts(given.encode())
    parameters = json.loads(given)
    if not isinstance(parameters, dict):
        raise ValueError("sampling_parameters is not the JSON of an object")
    if other := {"model", "n", "logprobs", "echo", "stream", "stream_options", "prompt"} & parameters.keys():
        raise RequestError(f"sampling_parameters: {min(other)} is not for Triton, whose answers are streams.")
    parameters["prompt"] = _text(request, "text_input")
    try:
        return CompletionRequest.model_validate(parameters)
    except ValidationError as error:
        raise wrong_field(error, json.dumps(parameters).encode()) from None


def _text(request: Any, name: str) -> str | None:
    """Return the text of an input, None if it is missing. Raises ValueError where it is not UTF-8."""
    tensor = triton.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()[0].decode()


def _tensor(name: str, text: str) -> Any:
    return triton.Tensor(name, np.array([text.encode()], np.object_))


def _fail(sender: Any, message: str) -> None:
    failed = triton.InferenceResponse(error=triton.TritonError(message))
    sender.send(failed, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
