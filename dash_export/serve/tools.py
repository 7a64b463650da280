"""Functions that a model may ask to call, in the form of Qwen, Hermes and SmolLM3: JSON between `<tool_call>` marks."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dash_export.errors import RequestError
from dash_export.serve.fields import Fields
from dash_export.text.guidance import json_rule
from dash_export.text.tokenizer import overlap

BEGIN, END = "<tool_call>", "</tool_call>"
LONGEST = 1 << 16
"""Most characters of a call."""


def _json(value: dict[str, Any]) -> dict[str, Any]:
    json.dumps(value, allow_nan=False)  # raises for NaN: an answer may repeat the object
    return value


Json = Annotated[dict[str, Any], AfterValidator(_json)]
"""JSON object without NaN and infinity, which the parser accepts but JSON does not have."""


class Function(Fields):
    idle = frozenset({"strict"})
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: Json = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(Fields):
    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    name: str


class ToolName(Fields):
    type: Literal["function"]
    function: FunctionName


Choice = Literal["none", "auto", "required"] | ToolName


def calls_grammar(
    tools: Sequence[Tool], choice: Choice, parallel: bool, marked: bool, schema: Mapping[str, Any] | None = None
) -> str | None:
    """Return the grammar of an answer: calls (`required`, or the one function that `choice` names), JSON of `schema`,
    or either of them (`auto`). Return None where any text will do. `marked`: BEGIN and END are tokens of the model.
    Raises RequestError.
    """
    answer = "" if schema is None else json_rule(schema)
    free = choice == "none" or (choice == "auto" and (not answer or not tools))
    if free:
        return f"start: {answer}\n" if answer else None
    named = None if isinstance(choice, str) else choice.function.name
    wanted = [tool.function for tool in tools if named in (None, tool.function.name)]
    if not wanted:
        raise RequestError(f"tool_choice: no such function is among the {len(tools)} tools.")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": _arguments(one, place)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, one in enumerate(wanted)
    ]
    several = r' ("\n" call)*' if parallel and named is None else ""
    # A token that was added to the vocabulary is named, not spelt: llguidance knows it by its name.
    begin, end = (BEGIN, END) if marked else (f'"{BEGIN}"', f'"{END}"')
    rules = [f"start: call{several}", f'call: {begin} "\\n" arguments "\\n" {end}']
    rules.append(f"arguments: {json_rule({'anyOf': calls})}")
    if choice == "auto":
        rules[0] += " | answer"
        rules.append(f"answer: {answer}")
    return "\n".join([*rules, ""])


def _arguments(function: Function, place: int) -> dict[str, Any]:
    """Return a function's schema with an `$id` of its own, so that its references stay inside. Raises RequestError."""
    given = {"type": "object", **function.parameters}
    given.pop("$schema", None)  # in old drafts an $id beside a $ref has no effect
    if given["type"] != "object" or re.search(r'"\$id": *"', json.dumps(given)):
        raise RequestError(f"tools: the parameters of {function.name} are not of type object, or have an $id.")
    return given | {"$id": f"tool:{place}"}


def split_calls(text: str, parallel: bool = True) -> tuple[str, list[dict[str, Any]]]:
    """Return an answer's text without its calls, and the calls as OpenAI has them; only the first one unless
    `parallel`. A broken call stays in the text.
    """
    calls: list[dict[str, Any]] = []
    words, at = "", 0
    while (start := text.find(BEGIN, at)) >= 0:
        begun = start + len(BEGIN)
        call, size = _call(text[begun : begun + LONGEST])
        words += text[at : begun if call is None else start]
        calls += [] if call is None else [call]
        at = begun + size
    words += text[at:]
    return (words.strip() if calls else words), calls if parallel else calls[:1]


def _no_number(said: str) -> None:
    raise ValueError(said)


_DECODER, _SPACE = json.JSONDecoder(parse_constant=_no_number), re.compile(r"\s*")


def _call(text: str) -> tuple[dict[str, Any] | None, int]:
    """Return the call at the start of the text, None if there is none, and its length in characters with END."""
    try:
        call, end = _DECODER.raw_decode(text, _SPACE.match(text).end())  # type: ignore[union-attr]
        name, arguments = call["name"], call.get("arguments", {})
        told = json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode(errors="replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, 0
    end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    if not isinstance(name, str) or not isinstance(arguments, dict) or not text.startswith(END, end):
        return None, 0
    name = name.encode(errors="replace").decode()  # half a character (a lone surrogate) cannot be sent
    made = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": told}}
    return made, end + len(END)


class TextBeforeCalls:
    """Filter of a streamed answer: passes the text before the first call, and holds back what may begin a call."""

    def __init__(self) -> None:
        self.held, self._said = "", False

    def push(self, text: str) -> str:
        self.held += text
        at = self.held.find(BEGIN)  # from the first call on all is held
        if at < 0:
            at = len(self.held) - overlap(self.held, BEGIN)
        if not self._said and self.held[:at].isspace():
            at = 0  # before a call it is no text
        self._said |= at > 0
        piece, self.held = self.held[:at], self.held[at:]
        return piece
