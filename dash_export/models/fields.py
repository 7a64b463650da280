"""Typed, bounded reading of values from an untrusted config: a bad value is a CheckpointError that names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash_export.errors import CheckpointError


def shown(value: object) -> str:
    """`value` for an error message, short whatever a hostile file put there."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a huge integer"  # str() of an integer beyond 4300 digits is an error of its own
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def positive_int(config: Mapping[str, Any], key: str, upper: int, default: int | None = None) -> int:
    """`config[key]` as an integer in [1, upper]; a missing or null key takes `default`, without one it is an error."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"the config lacks {key!r}, a positive integer")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= upper:
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected an integer from 1 to {upper}")
    return value


def positive_float(config: Mapping[str, Any], key: str, upper: float, default: float | None = None) -> float:
    """`config[key]` as a number in (0, upper]; a missing or null key takes `default`, without one it is an error."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"the config lacks {key!r}, a positive number")
        return default
    # The comparison comes first: float() of a huge integer overflows, and NaN compares false.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= upper:
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected a number above 0 and at most {upper:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """`config[key]` as true or false; a missing or null key takes `default`."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected true or false")
    return value
