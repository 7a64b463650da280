"""Builds for OpenVINO: the portable graphs as they are. They are compiled when they are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version

from dash_export.backends.maker import plan_segments
from dash_export.backends.onnxruntime.ort_maker import CpuBackend
from dash_export.bundle.records import Manifest, Segment
from dash_export.errors import BackendError

_DEVICE = re.compile(r"(CPU|GPU|NPU)(\.\d{1,3})?")


class OvMaker(CpuBackend):
    """Portable graphs of an encoder."""

    revision = 0

    def faults(self) -> Iterator[str]:
        recipe = self.recipe
        if recipe.engine is not None:
            yield "an [engine] table is for TensorRT and CUDA; openvino has none."
        if recipe.dialect != "portable":
            yield f"dialect {recipe.dialect!r}: openvino takes 'portable'."
        precisions = sorted(set(recipe.precisions.values()))
        if len(precisions) > 1 or precisions[0] not in ("fp32", "bf16", "fp16"):
            yield f"[weights] {', '.join(precisions)}: openvino computes everything in one of 'fp32', 'bf16', 'fp16'."
        if recipe.runtime.dispatch != "sync":
            yield f"dispatch {recipe.runtime.dispatch!r}: openvino takes 'sync'."
        if not _DEVICE.fullmatch(recipe.runtime.device):
            yield f"device = {recipe.runtime.device!r:.60}: openvino knows CPU, GPU and NPU (GPU.1: the second)."

    def check_model(self, manifest: Manifest) -> None:
        if manifest.model.decides != "input":
            raise BackendError(
                f"The recipe {self.recipe.name!r} is for encoders: OpenVINO takes 16 times as long for a decoded "
                "token of a causal LM as ONNX Runtime. Give --target cpu."
            )

    def require_runtime(self) -> None:
        super().require_runtime()
        from dash_export.backends.openvino.ov_engine import settings

        settings(self.recipe, 0)

    def segments(self, manifest: Manifest) -> tuple[Segment, ...]:
        """Return the segments. A policy is an engine of its own, which reads what a segment gives."""
        policy = manifest.policy
        return plan_segments(manifest.model.num_layers, policy.units, {policy.read} if policy.has_network else ())

    def version(self) -> str:
        return version("openvino")

    def device(self) -> str:
        name = self.recipe.runtime.device
        return super().device() if name == "CPU" else f"{name} beside {super().device()}"
