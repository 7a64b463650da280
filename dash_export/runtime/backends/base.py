"""What the dispatcher asks of a backend: load an engine, bind it to fixed memory once, then launch it again and
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Launch = Callable[[], None]
"""Runs one engine on the memory it was bound to; returns when its outputs are there (CPU) or when it is enqueued
(CUDA).
"""


class Engine(Protocol):
    """A loaded engine, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of every input and output. An output may share its input's memory (KV cache)."""
        ...


class Backend(Protocol):
    """Loads engines."""

    def load(self, path: Path) -> Engine:
        """Load an engine file; the same file is loaded once. Raises BackendError when the backend refuses it."""
        ...
