"""A tiny model folder and edited bundles of it, for every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tiny_root: Path) -> Path:
    """A tiny llama as a Hugging Face folder, with a chat template."""
    return tiny_root.parent / "model"


@pytest.fixture
def edit(own_bundle: Path) -> Callable[[str, str, str], Path]:
    """`edit(file, old, new)` changes a file of `own_bundle`, and returns the bundle."""

    def change(name: str, old: str, new: str) -> Path:
        path = own_bundle / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return own_bundle

    return change
