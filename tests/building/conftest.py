"""A bundle that was lowered where there is no card, to be carried to one."""

import shutil
from pathlib import Path

import pytest

from dash_export.building import build
from tests.backends.cuda.conftest import RECIPE


def write_recipe(path: Path, capacity: int = 96) -> str:
    """In 16 bits, as shipped ones are."""
    text = RECIPE.format(backend="tensorrt", dialect="trt10", sequences=1, profiles=2, own="fp16", layers="fp16")
    path.write_text(text.replace("kv_capacity = 96", f"kv_capacity = {capacity}"))
    return str(path)


@pytest.fixture(scope="session")
def carried(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine without the card leaves, without the portable graphs. Copy it to change it."""
    folder = tmp_path_factory.mktemp("carried")
    root = Path(shutil.copytree(tiny_root, folder / "tiny.dash", ignore=shutil.ignore_patterns("engines")))
    made = build(root, write_recipe(folder / "mine.toml"), keep_portable=False)
    assert (made.target, made.backend_version) == ("mine-lowered", "not compiled")
    assert made.verification is not None
    assert max(error for own in made.verification.engines.values() for error in own.values()) < 0.005
    assert not (root / "onnx").exists()
    return root


@pytest.fixture
def own(carried: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(carried, tmp_path / "own.dash"))
