"""The registry of backends. A backend is one folder beside this file and one line of BACKENDS: its checks of a recipe,
how it makes engines, how it loads and launches them. The recipe's `backend` names it.

A host backend loads an engine, binds it to fixed memory once, and launches it again and again. A GPU backend is a
`Cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Protocol, TypeVar

from dash_export.errors import BackendError

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.host.decode import EngineSet
    from dash_export.backends.host.encoder_pass import EncoderEngines
    from dash_export.backends.onnxruntime.ort_engine import OrtEngine
    from dash_export.bundle.bundle import Bundle
    from dash_export.bundle.records import Build

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Registered:
    """Backend, as names that are imported when they are used: a device has the packages of one backend only.

    `package`: what it needs, which the `extra` of dash-export installs. `load`: starts the backend (`(name, threads)`),
    which then loads engines. `maker`: the class that checks recipes and makes engines (`maker.py`). `devices`: whether
    its recipes may name a `device`.

    For `doctor`: `wheel`, the distribution with the package, where its name is another; `mend`, a second way to repair
    the install; `python`, the oldest that the package is made for; `provider`, what the package has to list.
    """

    package: str
    extra: str
    load: str
    maker: str
    devices: bool = False
    wheel: str = ""
    mend: str = ""
    python: tuple[int, int] = (3, 10)
    provider: str = ""

    def part(self, name: str) -> Any:
        """Import `load` or `maker`, given as `module:attribute`."""
        module, _, attribute = getattr(self, name).partition(":")
        return getattr(import_module(module), attribute)


_ORT, _CUDA, _TRT, _OV = (f"dash_export.backends.{name}" for name in ("onnxruntime", "cuda", "tensorrt", "openvino"))
_LOAD = f"{_TRT}.tensorrt:create"
BACKENDS = {
    "onnxruntime": Registered(
        "onnxruntime", "cpu", f"{_ORT}.ort_engine:create", f"{_ORT}.ort_maker:CpuBackend", python=(3, 11)
    ),
    "onnxruntime_cuda": Registered(
        "onnxruntime", "gpu", f"{_CUDA}.onnxruntime_cuda:create", f"{_CUDA}.cuda_maker:CudaBackend",
        wheel="onnxruntime-gpu", provider="CUDAExecutionProvider",
    ),
    "openvino": Registered("openvino", "openvino", f"{_OV}.ov_engine:create", f"{_OV}.ov_maker:OvMaker", devices=True),
    "tensorrt": Registered(
        "tensorrt", "tensorrt", _LOAD, f"{_TRT}.trt_maker:TensorRTBackend",
        mend="on a Jetson: sudo apt install --reinstall python3-libnvinfer",
    ),
    "tensorrt_rtx": Registered(
        "tensorrt_rtx", "rtx", _LOAD, f"{_TRT}.trt_maker:RtxBackend", wheel="tensorrt-rtx-cu13"
    ),
}  # fmt: skip
REFERENCE = "onnxruntime"
"""The backend that runs any graph of a bundle or of a build, for comparing, calibrating and training."""
MAIN: dict[str, Registered] = {}
"""Package -> the first backend that needs it."""
for _entry in BACKENDS.values():
    MAIN.setdefault(_entry.package, _entry)
RIVALS = {entry.wheel: entry for entry in BACKENDS.values() if MAIN[entry.package] != entry}
"""Distribution -> its backend, where another distribution brings the same package: only one can be installed."""
Launch = Callable[[], None]
"""Run one engine on its memory: the outputs are there when it returns (CPU), or the work is enqueued (CUDA)."""


class Started(Protocol):
    """A started backend."""

    def load_build(self, bundle: Bundle, build: Build, dispatch: str) -> EngineSet | EncoderEngines | DeviceEngines:
        """Load all engines of a build. Raises BackendError where they do not run here, PolicyError for a dispatch mode
        that this kind of backend has not.
        """
        ...


def require_backend(name: str) -> None:
    """Raise BackendError that names the extra to install when the backend's package is not installed."""
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r} in this version. Known: {', '.join(BACKENDS)}.")
    entry = BACKENDS[name]
    if find_spec(entry.package) is None:
        install = f"pip install 'dash-export[{entry.extra}]'"
        raise BackendError(f"The backend {name!r} is not installed on this machine. Run: {install}")


def has_reference() -> bool:
    """Return whether `reference_engine` works here."""
    return find_spec(BACKENDS[REFERENCE].package) is not None


def reference_engine(path: Path, own_threads: bool = False, spins: bool = True) -> OrtEngine:
    """Load any ONNX graph into the reference backend, on the process-wide thread pool or with threads of its own.
    `spins`: whether threads wait actively between runs. Raises BackendError where the graph is refused.
    """
    from dash_export.backends.onnxruntime.ort_engine import OrtEngine, session_options

    options = session_options(own_threads)
    if not spins:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return OrtEngine(path, options)


def load_backend(name: str, threads: int) -> Started:
    """Import and start a backend; for GPU targets it is a Cuda. Raises BackendError that names the missing package or
    device.
    """
    require_backend(name)
    return BACKENDS[name].part("load")(name, threads)  # type: ignore[no-any-return]


def no_layer_times(*_given: object) -> NoReturn:
    """Raise BackendError: what runs these engines does not say how long their layers take."""
    raise BackendError(
        "Only TensorRT and TensorRT-RTX say how long the layers inside an engine take. Leave --layers out, or give a "
        "target of one of them, on its card (`dash-export list` shows them)."
    )


def backend_errors(step: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `step` wrapped so that an error from a launch becomes a BackendError that names the engine.

    A launch is a C call without a Python frame, so the last frame of the traceback is its caller's, whose local
    variable `launch` tells the engine. Loops over launches pay nothing for this. An error of the caller's rule comes
    from a frame without `launch` and stays as it is.
    """

    @wraps(step)
    def guarded(*args: _P.args, **named: _P.kwargs) -> _T:
        try:
            return step(*args, **named)
        except Exception as error:
            *_, (frame, _) = walk_tb(error.__traceback__)
            engine = getattr(frame.f_locals.get("launch"), "engine", None)
            if engine is None:
                raise
            raise BackendError(
                f"{engine} failed ({error}). Where memory ran out, free some or use a shorter context; otherwise build "
                "the target again with this version."
            ) from error

    return guarded
