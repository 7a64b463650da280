"""The OpenAPI document is true: schemathesis makes requests of it, right and wrong ones."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from tests.serve.conftest import Serve

CHECKS = (not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance)  # fmt: skip


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("served", ["address", "text_address"])
def test_requests_of_the_document(request: pytest.FixtureRequest, served: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{request.getfixturevalue(served)}/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # it has nothing that could be wrong

        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict):  # answers are short, and of the model there is
                case.body |= {"model": "tiny"} if isinstance(case.body.get("model"), str) else {}
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if isinstance(case.body.get(name), int):
                        case.body[name] = min(case.body[name], 3)
            reply = case.call(timeout=30)
            seen.add(reply.status_code)
            case.validate_response(reply, checks=CHECKS)
            if isinstance(case.body, dict):  # with a field that the document does not have, whatever else
                case.body = {"guided_regexp": "[0-9]+"} | case.body
                refused = case.call(timeout=30)
                assert refused.status_code == 400
                case.validate_response(refused, checks=CHECKS)
                if mode is GenerationMode.POSITIVE:
                    assert refused.json()["error"]["code"] == "unknown_parameter"

        ask()
    assert seen <= {200, 400, 404}
    assert (200 if mode is GenerationMode.POSITIVE else 400) in seen


def test_the_document(serve: Serve) -> None:
    said = httpx.get(f"{serve(keys=['secret'])}/openapi.json").json()
    assert set(said["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
        "/v1/models", "/v1/models/{name}", "/tokenizer_info", "/health", "/metrics",
    }  # fmt: skip
    assert said["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert said["security"] == [{"key": []}]
    assert said["paths"]["/health"]["get"]["security"] == []
    chat = said["components"]["schemas"]["ChatRequest"]
    assert chat["properties"]["model"]["examples"] == ["tiny"]
    assert chat["additionalProperties"] is False
    assert "user" in chat["properties"], "taken, though it changes nothing"
