"""Finder of the recipes and calibration sets that ship with the package, in a wheel and in a source tree alike."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def resource_folder(name: str) -> Path:
    """Return the folder `engines` or `calibration`: packaged or, in an editable install, the package's sibling."""
    packaged = PACKAGE / "_resources" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
