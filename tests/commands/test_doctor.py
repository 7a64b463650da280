"""`doctor`: what is found, what conflicts, what is missing."""

from __future__ import annotations

import json

import pytest

from dash_export.commands import machine
from dash_export.targets import recipe_names
from tests.commands.helpers import dash

HERE = dict.fromkeys(machine.PACKAGES, "1.0") | {"onnxruntime-gpu": None}


def test_tables() -> None:
    result = dash("doctor")
    assert result.exit_code == 0, result.output
    for expected in ("Python", "onnxruntime", "CPUExecutionProvider", "portable", "No conflicts found."):
        assert expected in result.stdout


def test_json() -> None:
    report = json.loads(dash("doctor", "--json").stdout)
    assert [row["target"] for row in report["targets"]] == recipe_names()
    assert {"target": "cpu", "build": True, "run": True, "install": ""} in report["targets"]
    assert report["problems"] == []


def test_both_runtimes_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda _name: "1.0")
    result = dash("doctor")
    assert result.exit_code == 1
    assert "overwrite each other's files" in result.stdout
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in result.stdout


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda _name: None)
    result = dash("doctor")
    assert result.exit_code == 0
    assert "pip install 'dash-export[cpu,export]'" in result.stdout
    assert "pip install 'dash-export[cpu]'" in result.stdout


def test_runs_but_cannot_build() -> None:
    rows = {row["target"]: row for row in machine.targets(HERE | {"onnx": None})}
    assert (rows["cpu"]["build"], rows["cpu"]["run"]) == (False, True)
    assert rows["cpu"]["install"] == "pip install 'dash-export[export]'"
    assert rows["portable"]["build"]


def test_broken_wheel_and_missing_cuda() -> None:
    (broken,) = machine.problems(HERE, "ImportError: libfoo", False, [])
    assert "libfoo" in broken.problem
    gpu = HERE | {"onnxruntime": None, "onnxruntime-gpu": "1.0"}
    (cuda,) = machine.problems(gpu, None, True, ["CPUExecutionProvider"])
    assert "CUDA" in cuda.problem


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NVIDIA L4, 8.9, 23034 MiB, 580.82\nNVIDIA L4, 8.9, 23034 MiB, 580.82\n"
    monkeypatch.setattr(machine.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    done = machine.subprocess.CompletedProcess([], 0, answer, "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_args, **_options: done)
    assert [device["name"] for device in machine.gpus()] == ["NVIDIA L4", "NVIDIA L4"]
    assert machine.gpus()[0]["compute_cap"] == "8.9"
