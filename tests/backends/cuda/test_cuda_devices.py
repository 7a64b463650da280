"""The driver asked through ctypes: a stub library stands in for libcuda, sound and broken in the ways drivers are."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dash_export.backends.cuda import cuda_devices
from dash_export.errors import BackendError

SOUND = r"""
#include <string.h>
int cuInit(unsigned f) { return INIT; }
int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "Orin", n); return NAME; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : 1; return 0; }
int cuGetErrorString(int c, const char **s) { *s = "no such thing"; return 0; }
#ifndef OLD
int cuDeviceTotalMem_v2(unsigned long *b, int d) { *b = 8000000000; return 0; }
#endif
"""


def libcuda(folder: Path, monkeypatch: pytest.MonkeyPatch, *defines: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stub driver")
    (folder / "stub.c").write_text(SOUND)
    values = {"INIT": "0", "COUNT": "1", "NAME": "0"} | dict(each.split("=") for each in defines)
    flags = [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", *flags, folder / "stub.c", "-o", folder / "libcuda.so"], check=True
    )
    monkeypatch.setattr(cuda_devices, "_LIBRARIES", (str(folder / "libcuda.so"),))


def test_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda(tmp_path, monkeypatch)
    (device,) = cuda_devices.cuda_devices()
    assert device == cuda_devices.CudaDevice(0, "Orin", "8.7", 8_000_000_000, True, "12.6")


@pytest.mark.parametrize(
    ("define", "message"),
    [
        ("INIT=100", r"could not answer cuInit \(error 100: no such thing\)"),
        ("COUNT=0", "lists no device"),
        ("NAME=3", r"could not answer cuDeviceGetName \(error 3"),
        ("OLD=1", "damaged or too old.*cuDeviceTotalMem_v2"),
    ],
)
def test_broken_drivers(define: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda(tmp_path, monkeypatch, define)
    with pytest.raises(BackendError, match=message):
        cuda_devices.cuda_devices()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "_LIBRARIES", ("libthere-is-no-such-driver.so",))
    with pytest.raises(BackendError, match=r"no NVIDIA driver .*libcuda was not found"):
        cuda_devices.cuda_devices()
