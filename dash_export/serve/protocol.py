"""Requests in the form of OpenAI's API, and what their fields mean to this server. pydantic checks types; any other
mistake raises RequestError.

Unknown fields are mistakes (fields.py). The field `dash` is our own: it says how fast an answer should be.
"""

from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import from_json
from tokenizers import Tokenizer

from dash_export.core.kinds import Setting
from dash_export.core.sampling import Sampling
from dash_export.core.units import parse_layers
from dash_export.errors import RequestError
from dash_export.serve.fields import MOST, Few, FewEntries, Fields, Number, Whole, listed, refuse
from dash_export.serve.messages import Message, check_few
from dash_export.serve.tickets import Reading
from dash_export.serve.tools import BEGIN, END, Choice, Json, Tool, calls_grammar
from dash_export.text.guidance import json_grammar, regex_grammar

_ONE = [{"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": MOST}]
_PROMPTS = {"anyOf": [*_ONE, *({"type": "array", "items": one, "minItems": 1, "maxItems": 1024} for one in _ONE)]}


def _ids(given: Any) -> list[int]:
    """Return token ids. Raises ValueError. Checked by hand: pydantic takes too long for a million of mistakes."""
    if not isinstance(given, list) or len(given) > MOST or not all(type(token) is int for token in given):
        raise ValueError("expected token ids")
    return given


def _prompts(given: Any) -> list[str | list[int]]:
    """Return prompts, each a text or token ids, of one or a list of them. Raises ValueError for anything else."""
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if len(several) > 1024:
        raise ValueError("over 1024 prompts in one request")
    for one in several:
        if not isinstance(one, str) and (not one or not _ids(one)):
            raise ValueError("expected a text, or token ids, or a list of these")
    return several


Ids = Annotated[list[int], PlainValidator(_ids), WithJsonSchema(_ONE[1] | {"minItems": 0})]
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]


class Dash(Fields):
    """How much may be skipped: at most one amount, as in `runtime.session`. `skips`: tell the layers of every token."""

    policy: Literal["dense", "static", "token"] | None = None
    skip: Annotated[list[int], Few] | Annotated[str, Field(max_length=4096)] | None = None
    trade_off: Number | None = None
    budget: Number | None = None
    skipped: Number | None = None
    max_kl: Number | None = None
    max_layers: Whole | None = None
    hold: bool = True
    skips: bool = False

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


class StreamOptions(Fields):
    idle = frozenset({"include_obfuscation"})
    include_usage: bool | None = False


class JsonSchema(Fields):
    idle = frozenset({"name", "description", "strict"})
    schema_: Json = Field(alias="schema")


class ResponseFormat(Fields):
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


def _parsed(given: Any) -> Any:
    """Return a schema that may be a text of JSON."""
    if not isinstance(given, str):
        return given
    check_few([given])
    return from_json(given)


_SAMPLED = {"temperature", "top_p", "top_k", "min_p"}
_SAMPLED |= {"repetition_penalty", "frequency_penalty", "presence_penalty"}
"""Fields that `Sampling` has under the same names."""


class Asked(Fields):
    """Fields of all requests."""

    idle = frozenset({"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
                      "safety_identifier", "service_tier", "store", "user"})  # fmt: skip
    model: str = Field("", max_length=1024)


class Body(Asked):
    """Fields of all requests for an answer."""

    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    dash: Dash = Field(default_factory=Dash)


class Generation(Body):
    """Fields of both kinds of completion."""

    max_tokens: Whole | None = Field(None, ge=1, le=MOST)
    top_k: Whole | None = Field(None, ge=0)
    min_p: Number | None = Field(None, ge=0, lt=1)
    repetition_penalty: Number | None = Field(None, gt=0)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, Number], Field(max_length=1024), FewEntries] | None = None
    seed: Whole | None = None
    stop: str | Annotated[list[str], Few] | None = None
    n: Whole | None = Field(1, ge=1, le=16)
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    guided_json: Annotated[Json, BeforeValidator(_parsed)] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None

    operation: ClassVar[str] = "text_completion"
    """Name of the operation in OpenTelemetry's conventions."""

    @property
    def prompts(self) -> int:
        """Number of prompts, each of which has `n` answers."""
        return 1

    @property
    def continues(self) -> bool:
        """Whether answers go on with the texts of their prompts."""
        return True

    def guides(self) -> list[str]:
        """Return the names of the fields that hold the answer to a form."""
        return [name for name in ("guided_json", "guided_regex", "guided_grammar") if getattr(self, name) is not None]

    def grammar(self, tokenizer: Tokenizer) -> str | None:  # noqa: ARG002
        """Return the grammar that answers are held to, None if there is none. Raises RequestError."""
        if len(given := self.guides()) > 1:
            raise RequestError(f"{' and '.join(given)} exclude each other: an answer has one form.")
        if self.guided_json is not None:
            return json_grammar(self.guided_json)
        return self.guided_grammar if self.guided_regex is None else regex_grammar(self.guided_regex)

    def sampling(self, logprobs: int | None = None) -> Sampling:
        """Return how the first answer is sampled, without its grammar. Raises RequestError."""
        said: dict[str, Any] = {"temperature": 1.0, **self.model_dump(include=_SAMPLED, exclude_none=True)}
        if said["temperature"] < 1e-3:
            said["temperature"] = 0.0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        said |= {"logit_bias": self.logit_bias or {}, "ignore_eos": self.ignore_eos, "stop": stop, "logprobs": logprobs}
        return Sampling(**said, seed=None if self.seed is None else abs(self.seed))


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    operation: ClassVar[str] = "chat"
    undone: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("audio", "function_call", "functions", "moderation", "prediction", "reasoning_effort")),
        **{"web_search_options": None, "modalities": ["text"], "verbosity": "medium"},
    }
    messages: Annotated[list[Message], Few] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MOST)
    logprobs: bool | None = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Few] = Field(default_factory=list)
    tool_choice: Choice = "auto"
    parallel_tool_calls: bool = True
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @field_validator("messages")
    @classmethod
    def _few_parts(cls, messages: list[Message]) -> list[Message]:
        check_few(call.function.arguments for message in messages for call in message.tool_calls or ())
        return messages

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs", "needs logprobs: true")
        if self.continue_final_message:
            if self.add_generation_prompt:
                refuse("add_generation_prompt", "a continued message has none: leave it out")
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls or not last.plain()["content"].strip():
                refuse("continue_final_message", "the last message has to be the assistant's, and to have text")
        return self

    def guides(self) -> list[str]:
        calls = not isinstance(self.tool_choice, str) or self.tool_choice == "required"
        form = self.response_format is not None and self.response_format.type != "text"
        return [*super().guides(), *["response_format"] * form, *["tool_choice"] * (calls and not form)]

    def grammar(self, tokenizer: Tokenizer) -> str | None:
        if (own := super().grammar(tokenizer)) is not None:
            return own
        schema = None if self.response_format is None else self.response_format.wanted()
        marked = None not in map(tokenizer.token_to_id, (BEGIN, END))
        return calls_grammar(self.tools, self.tool_choice, self.parallel_tool_calls, marked, schema)

    @property
    def continues(self) -> bool:
        return self.continue_final_message

    def given_tools(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates expect them."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """POST /v1/completions."""

    undone: ClassVar[dict[str, Any]] = {"suffix": None, "best_of": 1}
    prompt: Prompts
    logprobs: Whole | None = Field(None, ge=0, le=20)
    echo: bool = False
    max_tokens: Whole | None = Field(16, ge=0, le=MOST)

    @model_validator(mode="after")
    def _fits(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            refuse("max_tokens", "0 is for echo: nothing would be answered")
        return self

    @property
    def prompts(self) -> int:
        return len(self.prompt)

    def reading(self) -> Reading | None:
        """Return what is wanted of the prompts themselves."""
        if not self.echo or (self.logprobs is None and self.max_tokens):
            return None
        return Reading(self.logprobs, only=self.max_tokens == 0)


def model_and_setting(name: str, dash: Dash) -> tuple[str, Setting | None]:
    """Return the model's name and the setting, which a name like `smollm2@budget=0.9` holds. Raises RequestError."""
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
            raise RequestError(f"model: {name!r:.100} is not like NAME@budget=0.9; known, each once: {listed(known)}.")
        given[key] = value
        if key not in ("policy", "skip", "hold"):
            with suppress(ValueError):
                given[key] = float(value)
    try:
        return base, Dash.model_validate(given).setting()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RequestError(f"model: {name!r:.100}: {first['loc'][0]}: {first['msg']}.") from None
