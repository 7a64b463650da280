"""How a model is cut into segments, and what a machine can build and run."""

from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given

from dash_export.backends import maker as backend_module
from dash_export.backends.cuda import cuda_maker
from dash_export.backends.cuda.cuda_devices import CudaDevice
from dash_export.backends.maker import backend_of, plan_segments
from dash_export.backends.tensorrt import trt_maker
from dash_export.bundle.recipe import load_recipe
from dash_export.core.units import Unit, parse_units
from dash_export.errors import BackendError
from tests.commands.helpers import refused
from tests.core.test_units import LAYERS, some_units


def names(units: str, *cut: int) -> list[str]:
    return [segment.name for segment in plan_segments(10, parse_units(units) if units else (), cut)]


def test_units_and_what_lies_between_them_are_engines() -> None:
    assert names("") == ["layers_00-09"]
    assert names("4") == ["layers_00-03", "layer_04", "layers_05-09"]
    assert names("1-2,3-5") == ["layer_00", "layers_01-02", "layers_03-05", "layers_06-09"]
    assert names("8-9") == ["layers_00-07", "layers_08-09", "head"]


def test_a_state_that_a_policy_reads_is_an_engines_output() -> None:
    assert names("4-6", 3) == ["layers_00-02", "layer_03", "layers_04-06", "layers_07-09"]
    assert names("4-6", 0) == ["embed", "layers_00-03", "layers_04-06", "layers_07-09"]


@given(some_units())
def test_every_layer_once(units: tuple[Unit, ...]) -> None:
    for cut in ((), (units[0].first - 1,)) if units else ((),):
        segments = plan_segments(LAYERS, units, cut)
        assert [layer for segment in segments for layer in segment.layers] == list(range(LAYERS))
        assert tuple(Unit(segment.first, segment.last) for segment in segments if segment.gated) == units
        assert [segment.embed for segment in segments] == [True] + [False] * (len(segments) - 1)
        assert [segment.head for segment in segments] == [False] * (len(segments) - 1) + [True]
        assert len({segment.name for segment in segments}) == len(segments)
        if not cut:
            assert not any(not a.gated and not b.gated and b.layers for a, b in pairwise(segments))


H100 = CudaDevice(0, "NVIDIA H100", "9.0", 80 << 30, False, "13.0")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(load_recipe("h100"))
    missing = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(trt_maker, "find_spec", lambda name: None if name in missing else object())

    def devices(*found: CudaDevice) -> None:
        monkeypatch.setattr(cuda_maker, "cuda_devices", lambda: list(found))

    no_driver = BackendError("There is no NVIDIA driver on this machine (libcuda was not found).")
    monkeypatch.setattr(cuda_maker, "cuda_devices", Mock(side_effect=no_driver))
    assert "needs a device of compute capability 9.0. There is no NVIDIA driver" in str(backend.build_obstacle())
    devices(CudaDevice(0, "NVIDIA L4", "8.9", 1, False, "13.0"))
    assert "needs compute capability 9.0, and NVIDIA L4 has 8.9" in str(backend.build_obstacle())
    assert backend.needs_another_machine()
    devices(H100)
    assert "package tensorrt is not installed (pip install 'dash-export[tensorrt]')" in str(backend.build_obstacle())
    assert not backend.needs_another_machine()
    assert "pip install 'dash-export[rtx]'" in str(backend_of(load_recipe("rtx")).build_obstacle())
    missing.clear()
    assert backend.build_obstacle() is None
    assert backend_of(load_recipe("rtx")).build_obstacle() is None


def test_without_cuda_bindings_it_compiles_but_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_maker, "cuda_devices", lambda: [H100])
    monkeypatch.setattr(trt_maker, "find_spec", lambda _name: object())
    monkeypatch.setattr(backend_module, "require_backend", lambda _name: None)
    backend = backend_of(load_recipe("h100"))
    assert backend.run_obstacle() is None
    monkeypatch.setattr(cuda_maker, "require_bindings", Mock(side_effect=BackendError("cuda-bindings is missing")))
    assert backend.build_obstacle() is None
    assert "cuda-bindings is missing" in str(backend.run_obstacle())


def test_an_onnxruntime_without_cuda_builds_and_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_maker, "cuda_devices", lambda: [H100])
    backend = backend_of(load_recipe("cuda"))
    assert backend.build_obstacle() is None
    assert "has no CUDA. It and onnxruntime-gpu overwrite each other" in str(backend.run_obstacle())


def test_a_missing_package_is_no_reason_to_lower_only(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_maker, "find_spec", lambda _name: None)
    message = refused("build", own_bundle, "--target", "rtx")
    assert "the package tensorrt_rtx is not installed (pip install 'dash-export[rtx]')." in message
    assert not list(own_bundle.glob("engines/rtx*"))
