"""A tiny model folder and a text, for every command."""

from pathlib import Path

import pytest

from dash_export.bundle.policy_file import save_policy
from dash_export.models import open_checkpoint
from tests.tiny import TEXT, tiny_policy


@pytest.fixture(scope="session")
def model(tiny_root: Path) -> Path:
    """A tiny llama as a Hugging Face folder, with a chat template."""
    return tiny_root.parent / "model"


@pytest.fixture
def trained(model: Path, tmp_path: Path) -> Path:
    """A policy file for the tiny model, as training would write it."""
    checkpoint = open_checkpoint(model)
    save_policy(tmp_path / "p.safetensors", tiny_policy(checkpoint, "linear", seed=5), checkpoint.spec, {"seed": 5})
    return tmp_path / "p.safetensors"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return path
