"""dash-export: dynamic layer skipping for language models, faster on a clock.

The public API is imported lazily, so that a device that only runs engines never imports the export and build code.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dash_export.building import build
    from dash_export.building.exporting import export
    from dash_export.errors import DashError
    from dash_export.runtime import DashRuntime, Policy, Sampling, State

_LAZY = {
    **dict.fromkeys(("DashRuntime", "Policy", "Sampling", "State"), "dash_export.runtime"),
    "DashError": "dash_export.errors",
    "build": "dash_export.building",
    "export": "dash_export.building.exporting",
}

__all__ = ["DashError", "DashRuntime", "Policy", "Sampling", "State", "__version__", "build", "export"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
