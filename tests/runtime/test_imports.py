"""What a device loads: the runtime, and none of the libraries that made the bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GENERATE = """
import sys
from dash_export.runtime import DashRuntime
runtime = DashRuntime.load(sys.argv[1], "cpu-fp32")
messages = [{"role": "user", "content": "Hi"}]
assert len(list(runtime.chat(messages, 4, trade_off=1.0))) == 4
runtime.score([1, 2, 3, 4], trade_off=1.0)
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf", "safetensors", "huggingface_hub"}
heavy |= {"polygraphy", "jinja2"}  # chat templates are rendered in a process of their own
print(sorted(heavy & set(sys.modules)), sorted(name for name in sys.modules if name.startswith("dash_export.")))
"""
GROUND = {
    "arguments",
    "artifacts",
    "bundle",
    "decision",
    "divergence",
    "errors",
    "manifest",
    "names",
    "outputs",
    "resources",
    "runtime",
    "targets",
    "text_files",
    "typed_json",
}


def run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_runtime_imports_only_the_ground(tiny_root: Path) -> None:
    heavy, own = run(GENERATE, str(tiny_root)).strip().split("] [")
    assert heavy == "["
    modules = {name.strip(" '[]").split(".")[1] for name in own.split(",")}
    assert modules <= GROUND, modules - GROUND


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys, dash_export; print(sorted({'numpy', 'onnxruntime', 'onnx', 'torch'} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_telemetry_is_off() -> None:
    code = "import os, dash_export.runtime.backends.onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code).strip() == "1"
