"""Finds the recipes and calibration sets that ship with the package, in a wheel and in a source tree alike."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def resource_folder(name: str) -> Path:
    """`engines` or `calibration`: the packaged folder if it is there, else the sibling of the package (editable
    install).
    """
    packaged = PACKAGE / "_resources" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
