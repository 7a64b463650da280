"""JSON and TOML -> frozen dataclasses, checked field by field: unknown and missing fields and wrong types are named."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that a terminal would obey, and halves of characters, which no file takes."""


class WrongFieldError(Exception):
    """The JSON is not what the dataclass asks for: a sentence that names the field."""


def typed(kind: type[_T], data: Any, where: str) -> _T:
    """A `kind` made of `data`. Raises WrongFieldError, to which the caller adds what to do about it."""
    return _convert(kind, data, where)  # type: ignore[no-any-return]


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(data, dict):
            raise WrongFieldError(f"{where} must be an object.")
        hints = get_type_hints(kind)
        required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
        missing, unknown = required - set(data), set(data) - set(hints)
        if missing or unknown:
            if missing:
                raise WrongFieldError(f"{where}: missing {', '.join(sorted(missing))}.")
            raise WrongFieldError(
                f"{where}: unknown {', '.join(map(repr, sorted(unknown))):.80}. Known: {', '.join(hints)}."
            )
        return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    if origin is tuple and isinstance(data, list):
        return tuple(_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        key_kind, value_kind = args
        try:
            return {
                key_kind(_convert(str, key, f"a key of {where}")): _convert(value_kind, value, f"{where}.{key}")
                for key, value in data.items()
            }
        except ValueError as error:
            raise WrongFieldError(f"{where} has a key that is not {key_kind.__name__}: {error}.") from error
    if origin is Literal:
        if not any(type(data) is type(value) and data == value for value in args):
            raise WrongFieldError(f"{where} = {data!r:.80} is not one of {', '.join(map(repr, args))}.")
        return data
    if origin in (Union, UnionType):
        return None if data is None and NoneType in args else _convert(args[0], data, where)
    if kind is float and type(data) is int:
        try:
            return float(data)
        except OverflowError as error:
            raise WrongFieldError(f"{where} is too large a number.") from error
    if kind is str and isinstance(data, str) and _CONTROL.search(data):
        raise WrongFieldError(f"{where} is not printable text: {data!r:.80}.")
    if isinstance(kind, type) and type(data) is kind and (not isinstance(data, float) or isfinite(data)):
        return data
    raise WrongFieldError(f"{where} must be {getattr(kind, '__name__', kind)}, got {data!r:.80}.")
