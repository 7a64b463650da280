"""A tiny model folder and edited bundles of it, for every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forged import replace_text
from tests.tiny import TEXT


@pytest.fixture(scope="session")
def model(tiny_root: Path) -> Path:
    """A tiny llama as a Hugging Face folder, with a chat template."""
    return tiny_root.parent / "model"


@pytest.fixture
def edit(own_bundle: Path) -> Callable[[str, str, str], Path]:
    """`edit(file, old, new)` changes a file of `own_bundle`, and returns the bundle."""

    def change(name: str, old: str, new: str) -> Path:
        replace_text(own_bundle / name, old, new)
        return own_bundle

    return change


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return path
