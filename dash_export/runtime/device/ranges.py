"""Named ranges on the host's timeline for Nsight Systems, where the package `nvtx` is installed: what is launched and
what is waited for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

try:
    _nvtx: Any = import_module("nvtx")
except ImportError:
    _nvtx = None


def named(name: str) -> AbstractContextManager[Any]:
    """A range for the time of a `with` block."""
    if _nvtx is None:
        return nullcontext()
    found: AbstractContextManager[Any] = _nvtx.annotate(name, domain="dash-export")
    return found
