"""Finder of the recipes and calibration sets that ship with the package, in a wheel and in a source tree alike."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def resource_folder(name: str) -> Path:
    """Return the folder `engines` or `calibration`: the packaged one if there is one, else the package's sibling
    (editable install).
    """
    packaged = PACKAGE / "_resources" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
