"""Checks of the public API's arguments against their type hints, before anything is computed. Ranges are checked where
a value is used. This module checks only types: numpy's numbers count as numbers; a bool, NaN and infinity do not.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce, wraps
from inspect import signature
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from dash_export.errors import DashError, RequestError
from dash_export.files.artifacts import Progress
from dash_export.files.typed_json import shown

Prompt = str | Sequence[int] | npt.NDArray[np.int64]
"""Text or token ids [n]."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _is(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _path(kind: Any, value: Any) -> Any:
    """Return `value`, an instance of `kind`. Raises TypeError; ValueError for a text or path with a NUL byte."""
    if isinstance(_is(kind, value), str | Path) and "\0" in str(value):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    # An integer of over 128 bits is refused: an error message could be unable to print it.
    if isinstance(value, bool | np.ndarray) or operator.index(value).bit_length() > 128:
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    number = float(value) if isinstance(value, float | np.floating) else _whole(value)
    if not isfinite(number):  # or OverflowError
        raise ValueError
    return number


def _several(value: Any) -> Any:
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        raise TypeError
    iter(value)
    return value


def _prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if hasattr(value, "__array__"):
        return np.asarray(value)
    kinds = set(map(type, _several(_is(Sequence, value))))
    if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        raise TypeError
    return value


_PROMPTS = ("a list of prompts, not one text", _several)
_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    bool: ("True or False", lambda value: bool(_is(bool | np.bool_, value))),
    int: ("a whole number", _whole),
    float: ("a finite number", _number),
    str: ("text", partial(_is, str)),
    str | Path: ("a path", partial(_path, str | Path)),
    Progress: ("a function of a name and two numbers", partial(_is, Callable)),
    tuple[int, ...]: ("a list of whole numbers", lambda value: tuple(map(_whole, _several(value)))),
    Mapping[int, float]: (
        "numbers by token id",
        lambda value: {_whole(token): _number(one) for token, one in _is(Mapping, value).items()},
    ),
    Sequence[str]: ("a list of texts", lambda value: tuple(_is(str, item) for item in _several(value))),
    Sequence[Mapping[str, str]]: (
        "a list of messages {role, content}",
        lambda value: [_is(Mapping, message) for message in _several(_is(Sequence, value))],
    ),
    npt.NDArray[np.float32]: (
        "an array of numbers",
        lambda value: np.asarray(value).astype(np.float32, casting="same_kind"),
    ),
    npt.NDArray[np.int8]: (
        "an array of small integers",
        lambda value: np.asarray(value).astype(np.int8, casting="safe"),
    ),
    Prompt: ("text, or one list of integers (token ids)", _prompt),
    Iterable[Prompt]: _PROMPTS,
    Iterable[Prompt | None]: _PROMPTS,
}
"""Type hint -> (words for the error message, function that converts an argument or raises)."""

_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _names(kind: Any) -> str:
    return " or a ".join("path" if one is Path else one.__name__ for one in get_args(kind) or (kind,) if one is not str)


def _taken(name: str, hint: Any, value: Any, error: type[DashError]) -> Any:
    options = get_args(hint)
    if hint is Any or (value is None and NoneType in options):
        return value
    kind: Any = (
        reduce(operator.or_, (option for option in options if option is not NoneType)) if NoneType in options else hint
    )
    words, take = _KINDS.get(kind) or (f"a {_names(kind)}", partial(_path, kind))
    try:
        return take(value)
    except Exception:  # a strange object may raise anything
        none = " or None" if NoneType in options else ""
        raise error(f"{name} must be {words}{none}; got {shown(value)}.") from None


def check_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap `function`: convert its arguments to its type hints (numpy's numbers to Python's) or raise RequestError."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*args: _P.args, **named: _P.kwargs) -> _T:
        hints = _hints(function)

        def taken(name: str, value: Any) -> Any:
            return _taken(name, hints.get(name, Any), value, RequestError)

        given = (*map(taken, names, args), *args[len(names) :])
        return function(*given, **{name: taken(name, value) for name, value in named.items()})

    return checked


def check_fields(item: Any, error: type[DashError] = RequestError) -> None:
    """Convert the fields of a dataclass to their type hints, in place, or raise `error`."""
    hints = _hints(type(item))
    vars(item).update({name: _taken(name, hints[name], value, error) for name, value in vars(item).items()})
