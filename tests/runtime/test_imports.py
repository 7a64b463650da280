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
print(sorted(heavy & set(sys.modules)))
"""
BARE = "import sys, dash_export; print(sorted({'numpy', 'onnxruntime', 'onnx', 'torch'} & set(sys.modules)))"


def run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_nothing_heavy_is_loaded(tiny_root: Path) -> None:
    assert run(GENERATE, str(tiny_root)) == "[]"
    assert run(BARE) == "[]", "the package itself imports nothing"
