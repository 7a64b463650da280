"""The wheel, installed where nothing else is: a device (`[cpu]`), an exporting machine (`[export]`). The
tests themselves run in an editable one.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dash_export.bundle.bundle import Bundle
from tests.conftest import ROOT
from tests.models.helpers import tiny_model, write_gguf

ABSENT = ["torch", "transformers"]
EXPORT_ONLY = ["onnx", "onnx_ir", "gguf", "safetensors"]
GENERATE = """
import sys, importlib.util
from dash_export import DashRuntime
from dash_export.bundle.recipe import recipe_names
from dash_export.files.resources import resource_folder
assert "cpu" in recipe_names(), recipe_names()
assert (resource_folder("calibration") / "prose.txt").is_file()
print(dash_path := importlib.util.find_spec("dash_export").origin)
print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])
print(DashRuntime.load(sys.argv[1], "cpu-fp32").generate([1, 2, 3], 5, trade_off=1.0).tokens.size)
"""
EXPORT = """
import sys, importlib.util
from dash_export import build, export
from dash_export.errors import BackendError
from dash_export.models import open_checkpoint
from dash_export.core.policy import untrained_policy
checkpoint = open_checkpoint(sys.argv[1])
bundle = export(checkpoint, sys.argv[2], untrained_policy(checkpoint.spec))
print([name for name in sys.argv[3:] if importlib.util.find_spec(name)])
try:
    build(bundle, "cpu")
except BackendError as error:
    print(error)
"""


def call(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], Path]:
    """`installed(requirement)` -> the python of an empty environment with it."""

    def make(*requirement: str) -> Path:
        call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
        python = tmp_path / "venv" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        arguments = [*pip, "install", "-q", "--no-compile", *requirement]
        result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        if result.returncode and "Could not find a version" in result.stderr:
            pytest.skip("no package index can be reached")
        assert result.returncode == 0, result.stderr
        return python

    return make


def test_the_wheel_holds_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entries,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "dash_export/_resources/engines/cpu.toml" in names
    assert "dash_export/_resources/calibration/prose.txt" in names
    assert {"dash_export/measure/card.html.jinja", "dash_export/backends/cuda/kernels.ptx"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("dash_export/", "dash_export-")) for name in names)
    assert "[polygraphy.run.plugins]\ndash-export = dash_export.polygraphy.plugin:arg_groups" in entries
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dash_export").rglob("*.py")}
    assert sources <= names


def test_a_device_generates(wheel: Path, installed: Callable[..., Path], tiny_root: Path, tmp_path: Path) -> None:
    python = installed(f"{wheel}[cpu]")
    origin, present, count = call(python, "-c", GENERATE, tiny_root, *ABSENT, *EXPORT_ONLY, cwd=tmp_path).splitlines()
    assert str(tmp_path) in origin
    assert (present, count) == ("[]", "5")
    script = python.with_name("dash-export")
    assert "dash-export" in call(script, "--version", cwd=tmp_path)
    answer = call(script, "run", tiny_root, "Hello", "--target", "cpu-fp32", "--max-tokens", "4", cwd=tmp_path)
    assert answer


def test_exporting_needs_no_torch(wheel: Path, installed: Callable[..., Path], tiny_root: Path, tmp_path: Path) -> None:
    python = installed(f"{wheel}[export]")
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=6), quantize="Q4_1")
    for model, name in ((tiny_root.parent / "model", "tiny.dash"), (tmp_path / "tiny.gguf", "gguf.dash")):
        present, error = call(python, "-c", EXPORT, model, tmp_path / name, *ABSENT, cwd=tmp_path).splitlines()
        assert present == "[]"
        assert "pip install 'dash-export[cpu]'" in error
        bundle = Bundle.open(tmp_path / name)
        bundle.verify(bundle.manifest.files)
