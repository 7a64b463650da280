"""`doctor`: what is found, what conflicts, what is missing; and that no odd machine makes it fall over."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dash_export.building import gpu_backends
from dash_export.commands import doctor, hardware, jetson
from dash_export.errors import BackendError
from dash_export.runtime import backends
from dash_export.runtime.cuda_devices import CudaDevice
from dash_export.targets import recipe_names
from tests.commands.helpers import dash, environment

HERE = dict.fromkeys(hardware.PACKAGES, "1.0") | {"onnxruntime-gpu": None}
NOTHING: dict[str, Any] = {"devices": [], "reason": "There is no NVIDIA driver.", "driver": None, "seen": []}
H100 = CudaDevice(0, "NVIDIA H100", "9.0", 80 << 30, False, "13.0")
ORIN = CudaDevice(0, "Orin", "8.7", 7_990_000_000, True, "12.6")

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025"
CLOCKS = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1190400 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=1020000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=65
NV Power Mode: MAXN_SUPER"""
FIXED = """cpu0:  Online=1 Governor=schedutil MinFreq=1728000 MaxFreq=1728000 CurrentFreq=1728000 IdleStates: WFI=0 c7=0
GPU MinFreq=1020000000 MaxFreq=1020000000 CurrentFreq=1020000000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1"""
HOSTILE = {
    "nothing": ":",
    "fails": "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
    "killed": "kill -11 $$",
    "hangs": "exec /bin/sleep 60",
    "never ends": "while :; do printf 'MinFreq=1 MaxFreq=2 NV Power Mode: '; done",
    "bytes": "printf '\\377\\376\\000\\033[2J\\033]0;x\\007, ,,,\\r\\n\\n[N/A], [N/A]\\n'",
    "numbers": "echo 'GPU MinFreq=9999999999999999 MaxFreq=-1 CurrentFreq=NaN'; echo 'NV Power Mode:'",
    "leaves a child": "/bin/sleep 60 &",
}
Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """tool(name, script): a program of this machine, which has no other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine's files are looked for."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path / "root")
    return tmp_path / "root"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lacking(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """These are not installed; without any, nothing is."""

    def find(name: str) -> Any:
        return None if not packages or name in packages else importlib.util.find_spec(name)

    for module in (gpu_backends, doctor, backends, hardware):
        monkeypatch.setattr(module, "find_spec", find)


def devices(monkeypatch: pytest.MonkeyPatch, answer: CudaDevice | Exception) -> None:
    def asked() -> list[CudaDevice]:
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    for module in (gpu_backends, hardware):
        monkeypatch.setattr(module, "cuda_devices", asked)


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    write(folder / "site" / name / "__init__.py", code)
    monkeypatch.syspath_prepend(str(folder / "site"))


def report(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = dash("doctor", "--json", *arguments)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def rows() -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in report()["targets"]}


def test_tables() -> None:
    result = dash("doctor")
    assert result.exit_code == 0, result.output
    for expected in ("Python", "onnxruntime", "CPUExecutionProvider", "portable", "No conflicts found."):
        assert expected in result.stdout


def test_json() -> None:
    told = report()
    assert [row["target"] for row in told["targets"]] == recipe_names()
    cpu = {"target": "cpu", "build": True, "run": True, "kit": False, "reason": "", "install": ""}
    assert cpu in told["targets"]
    assert told["problems"] == []


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles ahead of time is built, for the rest a kit is; no install line where nothing can be installed."""
    devices(monkeypatch, BackendError("There is no NVIDIA driver on this machine (libcuda was not found)."))
    found = rows()
    assert (found["cuda"]["build"], found["cuda"]["run"]) == (True, False)
    assert found["h100"] == {
        "target": "h100",
        "build": False,
        "run": False,
        "kit": True,
        "reason": "it needs a device of compute capability 9.0",
        "install": "",
    }
    assert "no device. There is no NVIDIA driver" in dash("doctor").stdout
    lacking(monkeypatch, "tensorrt_rtx")
    assert rows()["rtx"]["install"] == "pip install 'dash-export[rtx]'"


def test_both_runtimes_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "installed", lambda _name: "1.0")
    result = dash("doctor")
    assert result.exit_code == 1
    assert "overwrite each other's files" in result.stdout
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in result.stdout


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "installed", lambda _name: None)
    lacking(monkeypatch)
    printed = dash("doctor").stdout
    assert "pip install 'dash-export[cpu,export]'" in printed
    assert "pip install 'dash-export[cpu]'" in printed


def test_runs_but_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "onnx")
    found = rows()
    assert (found["cpu"]["build"], found["cpu"]["run"]) == (False, True)
    assert found["cpu"]["install"] == "pip install 'dash-export[export]'"
    assert found["portable"]["build"]


def test_missing_cuda_of_onnxruntime() -> None:
    gpu = HERE | {"onnxruntime": None, "onnxruntime-gpu": "1.0"}
    imports = dict.fromkeys(hardware.LOADED) | {"onnxruntime": hardware.Import("1.0", None, ("CPUExecutionProvider",))}
    (cuda,) = hardware.problems(gpu, imports, NOTHING | {"devices": ["one"]})
    assert "CUDA libraries are missing" in cuda.problem
    assert not list(hardware.problems(gpu, imports, NOTHING))


def test_the_current_folder_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may have been unpacked there."""
    (tmp_path / "json.py").write_text("raise SystemExit('pwned')")
    (tmp_path / "click.py").write_text("raise SystemExit('pwned')")
    monkeypatch.chdir(tmp_path)
    found = hardware.imported("numpy")
    assert found is not None
    assert found.error is None
    command = [sys.executable, "-m", "dash_export", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.stdout.startswith("dash-export, version"), done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import ctypes; ctypes.CDLL('libnvinfer.so.10')", "libnvinfer.so.10: cannot open shared object"),
        ("", "has no attribute '__version__'"),
        ("import os; os.abort()", "exit code -6"),
        ("import time; time.sleep(60)", "exit code -9"),
        ("print('{}'); raise SystemExit(0)", "{}"),
    ],
)
def test_half_an_install(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(hardware, "SECONDS", 1.0)
    devices(monkeypatch, ORIN)
    package(tmp_path, monkeypatch, "tensorrt", code)
    told = report(code=1)
    (problem,) = told["problems"]
    assert said in problem["problem"]
    assert "--reinstall" in problem["fix"]
    (nano,) = (row for row in told["targets"] if row["target"] == "jetson-orin-nano")
    assert not nano["build"]
    assert "the package tensorrt cannot be imported" in nano["reason"]
    assert not recwarn.list


def test_orin(root: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson Orin Nano with JetPack 6.2, asked by root."""
    write(root / "etc/nv_tegra_release", RELEASE + "\n# KERNEL_VARIANT: oot\n")
    write(root / "proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
    tool("nvpmodel", "echo 'NV Power Mode: MAXN_SUPER'; echo 2")
    tool("jetson_clocks", f"echo '{CLOCKS}'")
    tool("nvidia-smi", "echo 'Orin (nvgpu), 540.4.0'")
    devices(monkeypatch, ORIN)
    package(tmp_path, monkeypatch, "tensorrt", "__version__ = '10.3.0'")
    told = report()
    assert (told["jetson"]["l4t"], told["jetson"]["jetpack"]) == ("36.4.3", "6.2")
    assert told["jetson"]["clocks"]["GPU"] == {"lowest": 306, "highest": 1020, "now": 306, "fixed": False}
    assert told["cuda"]["driver"] == "540.4.0"
    found = {row["target"]: row for row in told["targets"]}
    assert found["jetson-orin-nano"]["build"]
    assert not found["jetson-orin-nano"]["kit"]
    assert found["l4"]["reason"].startswith("it needs compute capability 8.9, and Orin has 8.7")
    printed = dash("doctor").stdout
    for expected in (
        "Orin, compute capability 8.7, 7.99 GB shared with the CPU",
        "540.4.0, speaks CUDA 12.6",
        "Orin Nano Engineering Reference Developer Kit Super",
        "6.2 (Jetson Linux 36.4.3)",
        "MAXN_SUPER",
        "CPU 730 to 1728 MHz, now 1190; GPU 306 to 1020 MHz, now 306; EMC 204 to 3199 MHz, now 2133",
        "run `sudo jetson_clocks` before you measure",
    ):
        assert expected in printed
    tool("jetson_clocks", f"echo '{FIXED}'")
    assert report()["jetson"]["clocks_fixed"]
    assert "EMC fixed at 3199 MHz" in dash("doctor").stdout


def test_orin_without_root(root: Path, tool: Tool) -> None:
    """In a container: no release file; jetson_clocks refuses; the kernel tells the rest."""
    write(root / "proc/device-tree/compatible", "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0")
    for which in ("min", "max", "cur"):
        write(root / f"sys/class/devfreq/17000000.gpu/{which}_freq", "306000000\n")
    tool("jetson_clocks", "echo 'Error: Run this script(/usr/bin/jetson_clocks) as a root user'; exit 1")
    tool("nvpmodel", "echo 'NVPM WARN: fan mode is not set!'; echo 'NV Power Mode: MODE_15W'; echo 0")
    tool("dpkg-query", 'case "$4" in nvidia-l4t-core) echo 36.9.1-20300101;; *) echo 6.9+b1;; esac')
    found = jetson.jetson()
    assert found == {
        "model": "Jetson",
        "l4t": "36.9.1",
        "jetpack": "6.9",
        "power_mode": "MODE_15W",
        "clocks": {"GPU": {"lowest": 306, "highest": 306, "now": 306, "fixed": True}},
        "clocks_fixed": True,
    }
    assert "sudo jetson_clocks --show" in dash("doctor").stdout


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs(script: str, root: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "SECONDS", 0.3)
    monkeypatch.setattr(hardware, "problems", lambda *_facts: [])
    monkeypatch.setattr(hardware, "imported", lambda _module: None)
    devices(monkeypatch, AttributeError("undefined symbol: cuDeviceTotalMem_v2"))
    write(root / "etc/nv_tegra_release", "# R99 (release), REVISION: \x1b[2J")
    write(root / "proc/device-tree/model", "\x1b]0;mine\x07" * 100)
    for name in ("nvidia-smi", "nvpmodel", "jetson_clocks", "dpkg-query"):
        tool(name, script)
    result = dash("doctor")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    told = report()
    assert told["cuda"]["driver"] is None
    assert told["jetson"]["clocks"] == {}
    assert "The NVIDIA driver is damaged" in told["cuda"]["reason"]


def test_a_gpu_that_cuda_cannot_use(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvidia-smi", "echo 'NVIDIA L4, 580.82.07'; echo 'NVIDIA L4, 580.82.07'")
    devices(monkeypatch, BackendError("There is no NVIDIA driver on this machine (libcuda was not found)."))
    told = report(code=1)
    assert told["cuda"]["driver"] == "580.82.07"
    assert "There is a GPU (NVIDIA L4, NVIDIA L4), but CUDA cannot use it" in told["problems"][0]["problem"]


def test_tensorrt_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, H100)
    package(tmp_path, monkeypatch, "tensorrt", "__version__ = '10.3.0'")
    assert "TensorRT 10.3.0 has no KV cache update" in rows()["h100"]["reason"]
    package(tmp_path, monkeypatch, "tensorrt", "__version__ = '10.15.1'")
    assert rows()["h100"]["build"]
    lacking(monkeypatch, "tensorrt")
    assert rows()["h100"]["install"] == "pip install 'dash-export[tensorrt]'"
    devices(monkeypatch, ORIN)
    assert "apt install python3-libnvinfer" in rows()["jetson-orin-nano"]["install"]


def test_an_unforeseen_error_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, OSError("a driver of wax"))
    found = rows()
    assert found["cpu"]["run"]
    assert found["h100"]["reason"] == "OSError: a driver of wax"
