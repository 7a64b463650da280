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
    """`config[key]`, an integer in [1, upper]; a missing or null key takes `default`, without one it is an error."""
    return int(_positive(config, key, upper, default, (int,)))


def positive_float(config: Mapping[str, Any], key: str, upper: float, default: float | None = None) -> float:
    """`config[key]`, a number in (0, upper]; a missing or null key takes `default`, without one it is an error."""
    return float(_positive(config, key, upper, default, (int, float)))


def _positive(
    config: Mapping[str, Any], key: str, upper: float, default: float | None, kinds: tuple[type, ...]
) -> float:
    value = config.get(key)
    value = default if value is None else value
    what = "a positive integer" if kinds == (int,) else "a positive number"
    if value is None:
        raise CheckpointError(f"the config lacks {key!r}, {what}")
    # bool is not among the kinds; NaN compares false; float() of a huge integer would overflow.
    if type(value) not in kinds or not 0 < value <= upper:
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected {what} of at most {upper:g}")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """`config[key]` as true or false; a missing or null key takes `default`."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config {key!r} is {shown(value)}; expected true or false")
    return value
