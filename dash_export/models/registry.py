"""Model families by their Hugging Face `model_type`. A new family is one new file and one line in `_FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.models.spec import DecoderSpec

SpecFromConfig = Callable[[Mapping[str, Any]], DecoderSpec]

_FAMILIES = ("llama", "qwen2", "qwen3")
_registry: dict[str, SpecFromConfig] = {}


def register(model_type: str) -> Callable[[SpecFromConfig], SpecFromConfig]:
    """Make the decorated function the reader of configs with this `model_type`."""

    def decorate(reader: SpecFromConfig) -> SpecFromConfig:
        if model_type in _registry:
            raise ValueError(f"model_type {model_type!r} is registered twice")
        _registry[model_type] = reader
        return reader

    return decorate


def supported_model_types() -> list[str]:
    """The `model_type`s that can be exported, sorted."""
    for family in _FAMILIES:
        import_module(f"dash_export.models.{family}")
    return sorted(_registry)


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder a Hugging Face config describes. Raises CheckpointError for an unknown family or an option."""
    supported = ", ".join(supported_model_types())
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"the config has no model_type string; supported: {supported}")
    if model_type not in _registry:
        raise CheckpointError(f"model_type {model_type[:80]!r} is not supported; supported: {supported}")
    return _registry[model_type](config)
