"""`doctor`: what is found, what conflicts, what is missing."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dash_export.backends import base as backends
from dash_export.backends.cuda import cuda_maker
from dash_export.backends.cuda.cuda_devices import CudaDevice
from dash_export.backends.tensorrt import trt_maker
from dash_export.bundle.recipe import recipe_names
from dash_export.commands import doctor
from dash_export.errors import BackendError
from tests.commands.helpers import dash, environment

HERE = dict.fromkeys(doctor.PACKAGES, "1.0") | {"onnxruntime-gpu": None}
NOTHING: dict[str, Any] = {"devices": [], "reason": "There is no NVIDIA driver.", "driver": None, "seen": []}
NO_DRIVER = BackendError("There is no NVIDIA driver on this machine (libcuda was not found).")
H100 = CudaDevice(0, "NVIDIA H100", "9.0", 80 << 30, False, "13.0")
ORIN = CudaDevice(0, "Orin", "8.7", 7_990_000_000, True, "12.6")


def lacking(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """These are not installed; without any, nothing is."""

    def find(name: str) -> Any:
        return None if not packages or name in packages else importlib.util.find_spec(name)

    for module in (trt_maker, doctor, backends):
        monkeypatch.setattr(module, "find_spec", find)


def devices(monkeypatch: pytest.MonkeyPatch, answer: CudaDevice | Exception) -> None:
    def asked() -> list[CudaDevice]:
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    for module in (trt_maker, cuda_maker, doctor):
        monkeypatch.setattr(module, "cuda_devices", asked)


def tensorrt(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Install a TensorRT that consists of this code."""
    (folder / "site" / "tensorrt").mkdir(parents=True, exist_ok=True)
    (folder / "site" / "tensorrt" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def report(code: int = 0) -> dict[str, Any]:
    result = dash("doctor", "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def rows() -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in report()["targets"]}


def test_this_machine() -> None:
    told = report()
    assert [row["target"] for row in told["targets"]] == recipe_names()
    plain = {"target": "cpu", "build": True, "run": True, "lowers": False, "reason": "", "install": ""}
    assert plain in told["targets"]
    assert told["problems"] == []
    printed = dash("doctor").stdout
    for expected in ("Python", "onnxruntime", "CPUExecutionProvider", "portable", "No conflicts found."):
        assert expected in printed


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles ahead of time is built, the rest is lowered; no install line where nothing can be installed."""
    devices(monkeypatch, NO_DRIVER)
    found = rows()
    assert (found["cuda"]["build"], found["cuda"]["run"]) == (True, False)
    reason = "it needs a device of compute capability 9.0"
    row = found["h100"]
    assert (row["build"], row["run"], row["lowers"], row["reason"], row["install"]) == (False, False, True, reason, "")
    told = dash("doctor").stdout
    assert "no device. There is no NVIDIA driver" in told
    assert re.search(r"h100 +on the device +no +it needs", told)
    assert "On the device: `dash-export build` lowers the graphs here. Copy the bundle to the device" in told
    lacking(monkeypatch, "tensorrt_rtx")
    assert rows()["rtx"]["install"] == "pip install 'dash-export[rtx]'"


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as some:
        lacking(some, "onnx")
        found = rows()
        assert (found["cpu"]["build"], found["cpu"]["run"]) == (False, True)
        assert found["cpu"]["install"] == "pip install 'dash-export[export]'"
        assert found["portable"]["build"]
    monkeypatch.setattr(doctor, "installed", lambda _name: None)
    lacking(monkeypatch)
    printed = dash("doctor").stdout
    assert "pip install 'dash-export[cpu,export]'" in printed
    assert "pip install 'dash-export[cpu]'" in printed
    monkeypatch.setitem(doctor.MAIN, "onnxruntime", replace(doctor.MAIN["onnxruntime"], python=(99, 0)))
    found = rows()["cpu"]
    assert found["install"] == "pip install 'dash-export[export]'"
    assert found["reason"] == "onnxruntime needs Python 99.0 or newer"


def test_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages of ONNX Runtime; that of a GPU, overwritten by the other."""
    gpu = HERE | {"onnxruntime": None, "onnxruntime-gpu": "1.0"}
    ort = doctor.Import("1.0", None, ("CPUExecutionProvider",))
    imports = dict.fromkeys(doctor.LOADED) | {"onnxruntime": ort}
    ((said, _),) = doctor.problems(gpu, imports, NOTHING | {"devices": ["one"]})
    assert "overwritten its files" in said
    assert not list(doctor.problems(gpu, imports, NOTHING))
    monkeypatch.setattr(doctor, "installed", lambda _name: "1.0")
    result = dash("doctor")
    assert result.exit_code == 1
    assert "overwrite each other's files" in result.stdout
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in result.stdout


def test_a_card_and_an_onnxruntime_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing the other one beside it would break both, so that is not the advice."""
    devices(monkeypatch, H100)
    found = rows()["cuda"]
    assert (found["build"], found["run"], found["install"]) == (True, False, "")
    assert "has no CUDA" in found["reason"]
    monkeypatch.setitem(sys.modules, "dash_export.backends.cuda.onnxruntime_cuda", None)
    assert "onnxruntime cannot be imported" in rows()["cuda"]["reason"]


def test_the_current_folder_runs_nothing(tmp_path: Path) -> None:
    """A bundle may have been unpacked there."""
    for name in ("json.py", "click.py", "onnxruntime.py", "tensorrt.py"):
        (tmp_path / name).write_text("raise SystemExit('pwned')")
    command = [sys.executable, "-m", "dash_export", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path)
    assert json.loads(done.stdout)["packages"]["numpy"], done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import ctypes; ctypes.CDLL('libnvinfer.so.10')", "libnvinfer.so.10: cannot open shared object"),
        ("", "has no attribute '__version__'"),
        ("raise RuntimeError('\\x1b[2J')", "RuntimeError: [2J"),
    ],
)
def test_half_an_install(code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, ORIN)
    tensorrt(tmp_path, monkeypatch, code)
    told = report(code=1)
    (problem,) = told["problems"]
    assert said in problem["problem"]
    assert "--reinstall" in problem["fix"]
    (nano,) = (row for row in told["targets"] if row["target"] == "jetson-orin-nano")
    assert not nano["build"]
    assert "the package tensorrt cannot be imported" in nano["reason"]


def test_orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson Orin Nano with JetPack 6.2; and the same where CUDA does not start."""
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    for path, text in {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release\n",
        "dev/nvidia0": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    devices(monkeypatch, ORIN)
    tensorrt(tmp_path, monkeypatch, "__version__ = '10.3.0'")
    found = rows()
    assert found["jetson-orin-nano"]["build"]
    assert not found["jetson-orin-nano"]["lowers"]
    with monkeypatch.context() as some:
        lacking(some, "onnx")
        reason = rows()["jetson-orin-nano"]["reason"]
        assert reason.startswith("onnx not installed (lowered graphs are compiled without)")
    assert found["l4"]["reason"].startswith("it needs compute capability 8.9, and Orin has 8.7")
    printed = dash("doctor").stdout
    assert "Orin, compute capability 8.7, 7.99 GB shared with the CPU" in printed
    assert "540.4.0, speaks CUDA 12.6" in printed
    assert "Orin Nano Engineering Reference Developer Kit Super, R36 (release), REVISION: 4.3" in printed
    devices(monkeypatch, NO_DRIVER)
    assert "There is a GPU (nvidia0), but CUDA cannot use it" in report(code=1)["problems"][0]["problem"]


def test_tensorrt_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, H100)
    tensorrt(tmp_path, monkeypatch, "__version__ = '10.3.0'")
    assert "TensorRT 10.3.0 has no KV cache update" in rows()["h100"]["reason"]
    tensorrt(tmp_path, monkeypatch, "__version__ = '10.15.1'")
    assert rows()["h100"]["build"]
    lacking(monkeypatch, "tensorrt")
    assert rows()["h100"]["install"] == "pip install 'dash-export[tensorrt]'"
    devices(monkeypatch, ORIN)
    assert "apt install python3-libnvinfer" in rows()["jetson-orin-nano"]["install"]
