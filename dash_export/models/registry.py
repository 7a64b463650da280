"""Model families by their Hugging Face `model_type`. A new family is one new file and its name in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.models.fields import shown
from dash_export.models.spec import DecoderSpec

FAMILIES = ("llama", "qwen2", "qwen3")
"""Modules of this package; each has a `decoder(config)` for configs of its `model_type`."""


def decoder_spec(config: Mapping[str, Any], name: str = "") -> DecoderSpec:
    """The decoder a Hugging Face config describes, by a `name` without what a terminal would obey. Raises
    CheckpointError for an unknown family or an option.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"model_type {shown(family)} is not supported; supported: {', '.join(FAMILIES)}")
    spec: DecoderSpec = import_module(f"dash_export.models.{family}").decoder(config)
    return replace(spec, name="".join(filter(str.isprintable, name)) or "model")
