"""Messages of a chat, and how many lists and objects a request may have."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import field_validator
from pydantic_core import from_json

from dash_export.errors import RequestError
from dash_export.serve.fields import Few, Fields

PARTS = 16_384
"""Most lists and objects in a body, and in all arguments of calls in it: each costs as much as 1000 characters."""


def check_parts(body: bytes | bytearray) -> None:
    """Raise RequestError for JSON of more than PARTS lists and objects, before parsing it. Invalid JSON passes here."""
    if body.count(b"[") + body.count(b"{") > PARTS:
        outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]  # of texts
        if sum(part.count(b"[") + part.count(b"{") for part in outside) > PARTS:
            raise RequestError(f"The body has more than {PARTS} lists and objects.")


class ContentPart(Fields):
    idle = frozenset({"annotations", "cache_control", "logprobs", "image_url", "input_audio", "file"})
    """Beside a text; or of a part of another type, which `Message.plain` refuses."""
    type: str
    text: str | None = None


class Called(Fields):
    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        text = text or "{}"  # some clients send an empty text for no arguments
        check_few([text])
        with suppress(ValueError):
            if isinstance(from_json(text, allow_inf_nan=False), dict):
                return text
        raise ValueError("not the JSON of an object")


def check_few(texts: Iterable[str]) -> None:
    """Raise ValueError for JSON of more than PARTS lists and objects in all texts."""
    if sum(text.count("[") + text.count("{") for text in texts) > PARTS:
        raise ValueError(f"more than {PARTS} lists and objects")


class ToolCall(Fields):
    idle = frozenset({"index"})
    id: str = ""
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: its arguments are an object, not a text of JSON."""
        function = {"name": self.function.name, "arguments": from_json(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Fields):
    idle = frozenset({"annotations", "refusal"})
    undone: ClassVar[dict[str, Any]] = dict.fromkeys(("audio", "function_call"))
    role: Literal["system", "developer", "user", "assistant", "tool"]
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
