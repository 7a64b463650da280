"""CUDA devices, listed by the driver itself through ctypes: no package is needed, and a missing driver is no crash.

TensorRT's own `Runtime` may segfault where there is no device, so every GPU backend asks this module first.
"""

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import Any

from dash_export.errors import BackendError

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# CUdevice_attribute of cuda.h
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18


@dataclass(frozen=True)
class CudaDevice:
    """`capability` as "8.7"; `memory` in bytes; `driver` is the newest CUDA version the driver speaks, as "13.0"."""

    index: int
    name: str
    capability: str
    memory: int
    integrated: bool
    driver: str


def cuda_devices() -> list[CudaDevice]:
    """Return every CUDA device of this machine. Raises BackendError that says what is missing: driver or device."""
    ask = partial(_ask, _driver())
    ask("cuInit", 0)
    count, version = ctypes.c_int(), ctypes.c_int()
    ask("cuDeviceGetCount", ctypes.byref(count))
    ask("cuDriverGetVersion", ctypes.byref(version))
    if count.value == 0:
        raise BackendError("The NVIDIA driver is installed but it lists no device. Check CUDA_VISIBLE_DEVICES.")
    found = []
    for index in range(count.value):
        handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        ask("cuDeviceGet", ctypes.byref(handle), index)
        ask("cuDeviceGetName", name, len(name), handle)
        ask("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
        values = [ctypes.c_int() for _ in range(3)]
        for value, which in zip(values, (_MAJOR, _MINOR, _INTEGRATED), strict=True):
            ask("cuDeviceGetAttribute", ctypes.byref(value), which, handle)
        major, minor, integrated = (value.value for value in values)
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        text = name.value.decode(errors="replace")
        found.append(CudaDevice(index, text, f"{major}.{minor}", memory.value, bool(integrated), driver))
    return found


def _driver() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError("There is no NVIDIA driver on this machine (libcuda was not found).")


def _ask(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call one function of the driver. Raises BackendError when it fails or is not there."""
    try:
        code, text = getattr(driver, name)(*arguments), ctypes.c_char_p()
        if code:
            driver.cuGetErrorString(code, ctypes.byref(text))
    except AttributeError as error:
        raise BackendError(f"The NVIDIA driver is damaged or too old ({error}): install it again.") from None
    if code:
        said = (text.value or b"unknown").decode(errors="replace")
        raise BackendError(
            f"The NVIDIA driver could not answer {name} (error {code}: {said}). Check nvidia-smi, and that this "
            "process (container, user) may use the GPU."
        )
