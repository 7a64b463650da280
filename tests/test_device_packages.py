"""The device extra: that it resolves from the index for the machines it is for, and that it is enough."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from tests.commands.helpers import python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OFFLINE = (
    "NewConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "Name or service not known",
    "ProxyError",
    "Max retries",
)
MACHINES = [("3.10", "aarch64"), *((f"3.{minor}", "x86_64") for minor in range(10, 14))]
"""Python and processor: JetPack 6, whose glibc is 2.35 (the JetPacks before: 2.31), and servers."""
OLDEST = 28
"""glibc 2.28, whose wheels run with every later one."""


def wanted(extras: tuple[str, ...], version: str, machine: str) -> list[str]:
    """What the package and its extras ask for there. (pip would ask the markers of this machine.)"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    there = {**default_environment(), "python_version": version, "platform_machine": machine}
    found = map(Requirement, lines)
    return [f"{each.name}{each.specifier}" for each in found if each.marker is None or each.marker.evaluate(there)]


@pytest.mark.network
@pytest.mark.parametrize(("version", "machine"), MACHINES)
def test_it_resolves_from_the_index(version: str, machine: str, tmp_path: Path) -> None:
    """As wheels alone, with what benchmarks take beside it."""
    tags = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, OLDEST + 1))]
    there = [option for tag in tags for option in ("--platform", f"{tag}_{machine}")]
    asked = wanted(("device", "profile"), version, machine)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--retries=1"]
    pip += ["--disable-pip-version-check", "--only-binary=:all:", "--target", str(tmp_path / "lib")]
    pip += ["--implementation=cp", f"--python-version={version}", *there, "--report", str(tmp_path / "report.json")]
    done = subprocess.run([*pip, *asked], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and any(word in done.stderr for word in OFFLINE):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    found = {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in report["install"]}
    assert {"numpy", "tokenizers", "click", "cuda-bindings"} <= found.keys()
    assert not {"onnx", "onnx_ir", "onnxruntime", "torch", "transformers"} & found.keys()
    assert machine != "aarch64" or found["cuda-bindings"] == "12.8.0"


def test_it_is_enough_to_import() -> None:
    """What builds, runs and measures on a device, its benchmark, and the tests on a card."""
    modules = (
        "cli",
        "commands.build",
        "commands.run",
        "commands.doctor",
        "commands.card_report",
        "building.card_check",
        "commands.inspect",
        "backends.tensorrt.trt_maker",
    )
    code = (
        "import sys; from importlib import import_module; sys.path.insert(0, sys.argv[1])\n"
        "missing = 'onnx onnx_ir onnxruntime torch transformers gguf safetensors ml_dtypes huggingface_hub'.split()\n"
        "class Missing:\n"
        "    def find_spec(name, *_):\n"
        "        if name.partition('.')[0] in missing: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        "for name in sys.argv[2:]: import_module(name)"
    )
    names = [*(f"dash_export.{name}" for name in modules), "dash_export.backends.tensorrt.tensorrt", "common", "gpu"]
    names += ["tests.conftest", "tests.gpu.conftest", "tests.gpu.test_device", "tests.gpu.test_runtime"]
    ran = python(code, ROOT / "tools" / "bench", *names)
    assert ran.returncode == 0, ran.stderr
