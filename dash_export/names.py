"""Names of inputs, outputs and files that graphs, builds and the runtime agree on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

DEFAULT_TARGET = "cpu"
"""The target of every command that is given none."""

REPORT = "a dash-export report"
"""In the beginning of each file that a measuring command writes: only such a one does it write over."""

FINAL_STATE = "final_state"
"""Output of the head: the normed state of the tokens that get logits."""
MANIFEST, ROPE, SIGNATURE = "manifest.json", "rope.data", "manifest.json.sig"
"""Files of a bundle by which it is known, and what its owner signed."""
NO_HUB_ID = (".dash", ".gguf")
"""Endings of files, which no name of the hub has."""
ROUNDINGS = "roundings.npz"
TIMING_CACHE = "timing.cache"
"""Files in a build's folder from which engines are made again, and which no run reads."""


def cache_folder() -> Path:
    """Where what can be fetched or made again is kept between processes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-export"


def is_hub_id(name: str | Path) -> bool:
    """Whether `org/name` is of the hub: nothing here has its first part, and it is no file by its ending."""
    path = Path(name)
    if path.is_absolute() or len(path.parts) != 2 or path.suffix in NO_HUB_ID or ".." in path.parts:
        return False
    with suppress(OSError):  # a name of thousands of letters
        return not path.parent.exists()
    return False


def past_names(layer: int) -> tuple[str, str]:
    """Cache inputs of a portable layer graph, (key, value), as Optimum names them."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Cache outputs of a portable layer graph; bind each to the same memory as its input."""
    return f"present.{layer}.key", f"present.{layer}.value"


def new_names(layer: int) -> tuple[str, str]:
    """Outputs of a lowered graph in their place: the new rows alone, which the runtime writes into the cache. In
    `trt10` [1, kv_heads, sequence, head_dim], in an `ort` bypass [batch, sequence, kv_heads * head_dim].
    """
    return f"new.{layer}.key", f"new.{layer}.value"


def short_name(name: str) -> str:
    """`past_key_values.17.key` -> `past_key_17`, `present.17.key` -> `key_17`, `new.17.key` -> `new_key_17`: how
    ONNX Runtime's engines name their caches.

    It copies the names of inputs and outputs at every run; up to 15 characters need no memory of their own.
    """
    prefixes = {"past_key_values": "past_", "present": "", "new": "new_"}
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in prefixes:
        return name
    return f"{prefixes[parts[0]]}{parts[2]}_{parts[1]}"
