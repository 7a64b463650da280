"""CUDA devices, asked of the driver itself through ctypes: no package is needed, and a missing driver is no crash.

TensorRT's own `Runtime` may segfault where there is no device, so everything asks here first.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
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
    """Every CUDA device of this machine. Raises BackendError that says what is missing: driver or device."""
    driver = _driver()
    if (code := _function(driver, "cuInit")(0)) != 0:
        raise BackendError(
            f"The NVIDIA driver is installed but CUDA does not start ({_explain(driver, code)}). "
            "Check nvidia-smi, and that this process (container, user) may use the GPU."
        )
    count, version = ctypes.c_int(), ctypes.c_int()
    _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
    _ask(driver, "cuDriverGetVersion", ctypes.byref(version))
    if count.value == 0:
        raise BackendError("The NVIDIA driver is installed but it lists no device. Check CUDA_VISIBLE_DEVICES.")
    spoken = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return [_device(driver, index, spoken) for index in range(count.value)]


def _device(driver: ctypes.CDLL, index: int, spoken: str) -> CudaDevice:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _ask(driver, "cuDeviceGet", ctypes.byref(handle), index)
    _ask(driver, "cuDeviceGetName", name, len(name), handle)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(value), which, handle)
        return value.value

    return CudaDevice(
        index,
        name.value.decode(errors="replace"),
        f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        memory.value,
        bool(attribute(_INTEGRATED)),
        spoken,
    )


def _ask(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call one function of the driver. Raises BackendError when it fails or is not there."""
    if (code := _function(driver, name)(*arguments)) != 0:
        raise BackendError(f"The NVIDIA driver could not answer {name} ({_explain(driver, code)}). Check nvidia-smi.")


def _function(driver: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(driver, name)
    except AttributeError:
        raise BackendError(
            f"This machine's libcuda has no {name}: it is damaged, or too old. Install the NVIDIA driver again."
        ) from None


def _driver() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError("There is no NVIDIA driver on this machine (libcuda was not found).")


def _explain(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    known = _function(driver, "cuGetErrorString")(code, ctypes.byref(text)) == 0 and text.value is not None
    return f"error {code}: {text.value.decode(errors='replace')}" if known and text.value else f"error {code}"
