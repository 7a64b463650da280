"""Compile the product's CUDA kernels, which it ships as PTX.

    pip install nvidia-cuda-nvrtc-cu12==12.0.76 && python tools/compile_kernels.py

What the first NVRTC of CUDA 12 writes is loaded by every driver of CUDA 12 and 13. It needs no GPU.
"""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "dash_export" / "backends" / "cuda" / "kernels.cu"
OLDEST = b"--gpu-architecture=compute_75"
"""Target that every card from Turing on takes."""


def compiled(source: str) -> str:
    """Return the PTX of CUDA C. Raises ValueError with the compiler's words, ImportError where NVRTC is missing."""
    spec = find_spec("nvidia.cuda_nvrtc")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pip install nvidia-cuda-nvrtc-cu12==12.0.76")
    nvrtc = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / "libnvrtc.so.12"))

    def text(of: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{of}Size")(program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{of}")(program, found)
        return found.value.decode()

    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    with ThreadPoolExecutor(1) as apart:  # NVRTC leaves its thread the locale of C, in which files are ASCII
        failed = apart.submit(nvrtc.nvrtcCompileProgram, program, 1, (ctypes.c_char_p * 1)(OLDEST)).result()
    if failed:
        raise ValueError(text("ProgramLog"))
    return re.sub(r"\.global .*_INTERNAL_.*\n", "", text("PTX"))  # of NVRTC's own, used by nothing


if __name__ == "__main__":
    SOURCE.with_suffix(".ptx").write_text(compiled(SOURCE.read_text(encoding="utf-8")))
