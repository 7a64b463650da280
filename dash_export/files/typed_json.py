"""JSON and TOML -> frozen dataclasses, checked field by field: unknown and missing fields and wrong types are named.
The fields of a dataclass that a caller made are checked in the same way (`check_fields`).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from math import inf, isfinite
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, which a terminal would obey, and lone surrogates, which no file can hold."""
_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60


class WrongFieldError(Exception):
    """The data does not fit the dataclass. The message is one sentence that names the field."""


class Within(NamedTuple):
    """Bounds of a number: `Annotated[int, Within(1, 64)]`."""

    low: float
    high: float = inf


Bytes = Annotated[int, Within(0, 1 << 50)]
"""Size of a file in bytes: an absurd size fails where it is read, not where memory is taken."""
NotNegative = Annotated[float, Within(0)]
FreeText = Annotated[str, "free"]
"""Text that may hold any characters, line ends too."""


def shown(value: object) -> str:
    """Return a value as one short line for a message, whatever the value is."""
    try:
        return " ".join(_REPR.repr(value).split())
    except Exception:  # a number of 5,000 digits, say
        return f"a {'huge ' * isinstance(value, int)}{type(value).__name__}"


MOST_ITEMS, MOST_DEPTH, MOST_BITS = 1 << 16, 8, 128


def typed(kind: type[_T], data: Any, where: str) -> _T:
    """Make a `kind` of `data`. Raises WrongFieldError, which names `where`; the caller adds what to do about it."""
    return _convert(kind, data, where)  # type: ignore[no-any-return]


def check_fields(item: Any, error: type[Exception]) -> None:
    """Convert the fields of a dataclass to their type hints, in place, numpy's too, or raise `error`."""
    for name, hint in _hints(type(item)).items():
        try:
            vars(item)[name] = _convert(hint, _plain(vars(item)[name]), name)
        except WrongFieldError as wrong:
            raise error(str(wrong)) from None


def _plain(value: Any) -> Any:
    """Return a value with lists for tuples and arrays and Python's numbers for numpy's."""
    if hasattr(type(value), "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        if _too_deep(data):
            raise WrongFieldError(f"{where} is nested too deep.")
        return data
    if is_dataclass(kind):
        return _record(kind, data, where)
    if kind == FreeText and isinstance(data, str):
        return data
    if origin is Annotated and kind != FreeText:
        value, (low, high) = _convert(args[0], data, where), args[1]
        if not low <= value <= high:
            raise WrongFieldError(f"{where} = {shown(value)} is outside {low} to {high}.")
        return value
    if origin in (tuple, dict) and isinstance(data, (list, dict)) and len(data) > MOST_ITEMS:
        raise WrongFieldError(f"{where} has {len(data)} items; at most {MOST_ITEMS} are read.")
    if origin is tuple and isinstance(data, list):
        return tuple(_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        keys = [_convert(args[0], key, f"a key of {where}") for key in data]
        return {key: _convert(args[1], data[key], f"{where}.{key}") for key in keys}
    if origin is Literal:
        if not any(type(data) is type(value) and data == value for value in args):
            raise WrongFieldError(f"{where} = {shown(data)} is not one of {', '.join(map(repr, args))}.")
        return data
    if origin in (Union, UnionType):
        if data is None and NoneType in args:
            return None
        own = (one for one in args if is_dataclass(one) and isinstance(data, dict) and _names(one) >= set(data))
        return _convert(next(own, args[0]), data, where)  # of several records the first that has all fields given
    if kind in (int, float) and type(data) is int:
        if data.bit_length() > MOST_BITS:
            raise WrongFieldError(f"{where} is too large a number.")
        return kind(data)
    if kind is str and isinstance(data, str) and _CONTROL.search(data):
        raise WrongFieldError(f"{where} is not printable text: {shown(data)}.")
    if isinstance(kind, type) and type(data) is kind and (not isinstance(data, float) or isfinite(data)):
        return data
    raise WrongFieldError(f"{where} must be {_name(kind)}, got {shown(data)}.")


def _too_deep(data: Any, left: int = MOST_DEPTH) -> bool:
    """Return whether lists and mappings are nested in over MOST_DEPTH levels, their innermost values included."""
    inner: Iterable[Any] = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return not left or any(_too_deep(item, left - 1) for item in inner)


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise WrongFieldError(f"{where} must be an object (a table), got {shown(data)}.")
    hints = {item.name: _hints(kind)[item.name] for item in fields(kind)}
    required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    if missing := required - set(data):
        raise WrongFieldError(f"{where}: missing {', '.join(sorted(missing))}.")
    if unknown := set(data) - set(hints):
        raise WrongFieldError(f"{where}: unknown {shown(min(unknown))}. Known: {', '.join(hints)}.")
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _names(kind: Any) -> set[str]:
    return {item.name for item in fields(kind)}


_hints: Callable[[Any], dict[str, Any]] = cache(partial(get_type_hints, include_extras=True))


def _name(kind: Any) -> str:
    return {tuple: "a list", dict: "an object"}.get(get_origin(kind)) or str(getattr(kind, "__name__", kind))
