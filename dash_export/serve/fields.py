"""Rules that all JSON objects of a request share: which fields are known, and what is a number."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import LiteralString

MOST = 1 << 20
Few = Field(max_length=1024, fail_fast=True)
"""Limit of a list, read up to its first mistake: each mistake would cost as much as 1000 correct entries."""


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > 1024:
        raise ValueError("more than 1024 entries")
    return given


FewEntries = BeforeValidator(_few)
"""The same limit of an object, before any entry is read: pydantic reads all of them, mistakes or not."""
UNKNOWN: Final = "unknown_parameter"
UNSUPPORTED: Final = "unsupported_parameter"
"""OpenAI's codes of these errors."""


def _number(given: Any) -> Any:
    if isinstance(given, bool | str):  # which pydantic would convert
        raise ValueError("expected a number")
    return given


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]


class Fields(BaseModel):
    """JSON object of a request. A field that is null is left out: some clients send null for what they leave open. An
    unknown field is a mistake, told once and with the known ones.
    """

    model_config = ConfigDict(extra="forbid")  # for the JSON schema: `_known` is first
    idle: ClassVar[frozenset[str]] = frozenset()
    """Fields of OpenAI's that are taken and change nothing here."""
    undone: ClassVar[Mapping[str, Any]] = {}
    """Fields of OpenAI's that this server does not have, with OpenAI's default: this, or nothing, may be given."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known, kept = {field.alias or name for name, field in cls.model_fields.items()}, dict[str, Any]()
        for name, value in given.items():
            if value is None:
                continue
            if name in known:
                kept[name] = value
            elif name in cls.undone and value and value != cls.undone[name]:
                refuse(name, f"OpenAI's API has this field, this server has not. Known: {listed(known)}", UNSUPPORTED)
            elif name not in cls.undone and name not in cls.idle:
                refuse(name, f"there is no such field. Known: {listed(known)}", UNKNOWN)
        return kept


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def refuse(name: str, why: str, code: LiteralString = "value_error") -> NoReturn:
    """Raise the ValidationError of a field: within a validator it becomes one of the whole request."""
    said = PydanticCustomError(code, "{why}", {"why": why})
    raise ValidationError.from_exception_data("request", [InitErrorDetails(type=said, loc=(name,), input=None)])
