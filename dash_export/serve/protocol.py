"""Requests in the form of OpenAI's API, and what their fields mean to this server. pydantic checks types; any other
mistake raises RequestError.

Unknown fields are ignored, as other servers do. The field `dash` is our own: it says how fast an answer should be.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import from_json
from tokenizers import Tokenizer

from dash_export.decision import Setting, parse_layers
from dash_export.errors import RequestError
from dash_export.runtime.sampling import Sampling
from dash_export.serve.tools import BEGIN, END, Choice, Json, Tool, calls_grammar

MOST = 1 << 20
PARTS = 16_384
"""Most lists and objects in a body, and in all arguments of calls in it: each costs as much as 1000 characters."""
Few = Field(max_length=1024, fail_fast=True)
"""Limit of a list, read up to its first mistake: each mistake would cost as much as 1000 correct entries."""
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": MOST}
_PROMPT = {"anyOf": [{"type": "string"}, _IDS] + [
    {"type": "array", "items": one, "minItems": 1, "maxItems": 1} for one in ({"type": "string"}, _IDS)
]}  # fmt: skip


def _one_prompt(given: Any) -> Any:
    """Return the prompt, a text or token ids, without the list that may hold it. Raises ValueError for anything else.

    Checked by hand: pydantic's union of lists costs too much on four megabytes of mistakes.
    """
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        if len(given) > 1:
            raise ValueError("several prompts in one request are not supported; send one each")
        given = given[0]
    if isinstance(given, str):
        return given
    if isinstance(given, list) and 0 < len(given) <= MOST and all(type(one) is int for one in given):
        return given
    raise ValueError("expected a text, or token ids")


def check_parts(body: bytes | bytearray) -> None:
    """Raise RequestError for JSON of more than PARTS lists and objects, before parsing it. Invalid JSON passes here."""
    if body.count(b"[") + body.count(b"{") > PARTS:
        outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]  # of texts
        if sum(part.count(b"[") + part.count(b"{") for part in outside) > PARTS:
            raise RequestError(f"The body has more than {PARTS} lists and objects.")


class Dash(BaseModel):
    """How much may be skipped: at most one amount, as in `runtime.session`. `skips`: tell the layers of every token."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["dense", "static", "token"] | None = None
    skip: Annotated[list[int], Few] | Annotated[str, Field(max_length=4096)] | None = None
    trade_off: float | None = None
    budget: float | None = None
    skipped: float | None = None
    max_kl: float | None = None
    max_layers: int | None = None
    hold: bool = True
    skips: bool = False

    @model_validator(mode="before")
    @classmethod
    def _small(cls, given: Any) -> Any:
        """Raise ValueError for too many fields: pydantic would report each unknown one as a mistake of its own."""
        if isinstance(given, dict) and len(given) > len(cls.model_fields):
            raise ValueError("too many fields")
        return given

    def setting(self) -> Setting | None:
        """Return the session's setting, None if the request has none. Raises RequestError for `hold` alone."""
        given = self.model_dump(exclude_defaults=True, exclude={"skips"})
        if not given:
            return None
        if given.keys() == {"hold"}:
            raise RequestError("dash: hold is of a budget, and there is none.")
        if isinstance(self.skip, str):
            given["skip"] = parse_layers(self.skip)
        return Setting(**given)


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class ContentPart(BaseModel):
    type: str
    text: str | None = None


class Called(BaseModel):
    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        text = text or "{}"  # some clients send an empty text for no arguments
        _check_arguments([text])
        with suppress(ValueError):
            if isinstance(from_json(text, allow_inf_nan=False), dict):
                return text
        raise ValueError("not the JSON of an object")


def _check_arguments(texts: Iterable[str]) -> None:
    if sum(text.count("[") + text.count("{") for text in texts) > PARTS:
        raise ValueError(f"more than {PARTS} lists and objects")


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: its arguments are an object, not a text of JSON."""
        function = {"name": self.function.name, "arguments": from_json(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    role: str
    content: str | Annotated[list[ContentPart], Few] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Few] | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message as chat templates expect it: text parts joined. Raises RequestError for other parts."""
        content = self.content
        if isinstance(content, list):
            if other := next((part.type for part in content if part.type != "text" or part.text is None), None):
                raise RequestError(f"content of type {other!r:.60} is not supported; supported: text.")
            content = "".join(part.text or "" for part in content)
        said = self.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content or "", **said, **calls}


class JsonSchema(BaseModel):
    schema_: Json = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def wanted(self) -> dict[str, Any] | None:
        """Return the answer's JSON schema, None if the answer may be any text. Raises RequestError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None:
            raise RequestError("response_format: json_schema is missing.")
        return self.json_schema.schema_


_SAMPLED = {"temperature", "top_p", "top_k", "min_p"}
_SAMPLED |= {"repetition_penalty", "frequency_penalty", "presence_penalty"}
"""Fields that `Sampling` has under the same names."""


class Body(BaseModel):
    """Fields of all requests. One that is null is left out: some clients send null for what they leave open."""

    model: str = Field("", max_length=1024)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    dash: Dash = Field(default_factory=Dash)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {name: one for name, one in given.items() if one is not None} if isinstance(given, dict) else given


class Generation(Body):
    """Fields of both kinds of completion."""

    max_tokens: int | None = Field(None, ge=1, le=MOST)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None
    stop: str | Annotated[list[str], Few] | None = None
    n: int | None = Field(1, ge=1, le=16)
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    suffix: None = None
    best_of: Literal[1] | None = 1
    functions: None = None
    function_call: None = None

    operation: ClassVar[str] = "text_completion"
    """Name of the operation in OpenTelemetry's conventions."""

    def guided(self) -> bool:
        """Return whether the answer may be held to a grammar."""
        return False

    def grammar(self, tokenizer: Tokenizer) -> str | None:  # noqa: ARG002
        """Return the grammar that answers are held to, None if there is none. Raises RequestError."""
        return None

    def sampling(self, logprobs: int | None = None) -> Sampling:
        """Return how the first answer is sampled, without its grammar. Raises RequestError."""
        said: dict[str, Any] = {"temperature": 1.0, **self.model_dump(include=_SAMPLED, exclude_none=True)}
        if said["temperature"] < 1e-3:
            said["temperature"] = 0.0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(**said, seed=None if self.seed is None else abs(self.seed), stop=stop, logprobs=logprobs)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    operation: ClassVar[str] = "chat"
    messages: Annotated[list[Message], Few] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Few] = Field(default_factory=list)
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True

    @field_validator("messages")
    @classmethod
    def _few_parts(cls, messages: list[Message]) -> list[Message]:
        _check_arguments(call.function.arguments for message in messages for call in message.tool_calls or ())
        return messages

    def guided(self) -> bool:
        calls = not isinstance(self.tool_choice, str) or self.tool_choice == "required"
        return calls or (self.response_format is not None and self.response_format.type != "text")

    def grammar(self, tokenizer: Tokenizer) -> str | None:
        schema = None if self.response_format is None else self.response_format.wanted()
        marked = None not in map(tokenizer.token_to_id, (BEGIN, END))
        return calls_grammar(self.tools, self.tool_choice, self.parallel_tool_calls, marked, schema)

    def given_tools(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates expect them."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt), WithJsonSchema(_PROMPT)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = False
    response_format: None = None
    tools: None = None
    max_tokens: int | None = Field(16, ge=1, le=MOST)


def model_and_setting(name: str, dash: Dash) -> tuple[str, Setting | None]:
    """Return the model's name and the setting. A name like `smollm2@budget=0.9` is for clients that cannot send `dash`.
    Raises RequestError.
    """
    base, at, alias = name.partition("@")
    if not at:
        return base, dash.setting()
    if dash.setting() is not None:
        raise RequestError(f"model: {name!r:.100} says how much is skipped, and so does dash: leave one out.")
    given: dict[str, Any] = {}
    known = Dash.model_fields.keys() - {"skips"}
    for part in alias.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known or key in given:
            raise RequestError(
                f"model: {name!r:.100} is not like NAME@budget=0.9; known, each once: {', '.join(sorted(known))}."
            )
        given[key] = value
    try:
        return base, Dash.model_validate(given).setting()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestError(f"model: {name!r:.100}: {first['loc'][0]}: {first['msg']}.") from None
