"""Checks of a recipe for OpenVINO."""

import re
from collections.abc import Iterator

from dash_export.bundle.recipe import Recipe

_DEVICE = re.compile(r"(CPU|GPU|NPU)(\.\d{1,3})?")


def faults(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go together."""
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
