"""A tiny model folder and a text, for every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TEXT


@pytest.fixture(scope="session")
def model(tiny_root: Path) -> Path:
    """A tiny llama as a Hugging Face folder, with a chat template."""
    return tiny_root.parent / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return path
