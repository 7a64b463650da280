"""Checks of a recipe for TensorRT and TensorRT-RTX."""

from collections.abc import Iterator

from dash_export.backends.cuda.cuda_recipe import device_faults
from dash_export.bundle.recipe import Recipe

FP8_SINCE = 8.9
"""Lowest compute capability with fp8 (Ada; Hopper and later have it, too)."""
INT4_BLOCKS = (64, 128)
"""Inputs that share a scale, as NVIDIA documents them ("Quantization Schemes" of TensorRT's documentation)."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 compiles for; TensorRT itself compiles for the device it runs on."""


def faults(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go together."""
    engine = recipe.engine
    if engine is not None and engine.activations == "fp32":
        yield "activations = 'fp32': TensorRT has no fp32 attention; take 'fp16' or 'bf16'."
    yield from device_faults(recipe)
    if engine is None:
        return
    foreign = sorted(set(engine.capabilities) - set(RTX_CAPABILITIES))
    if recipe.backend == "tensorrt_rtx" and foreign:
        yield f"TensorRT-RTX does not compile for {foreign[0]}; it knows {', '.join(RTX_CAPABILITIES)}."
    if "int4" in recipe.precisions.values() and recipe.weights.block_size not in INT4_BLOCKS:
        yield f"block_size = {recipe.weights.block_size}: TensorRT's int4 has blocks of 64 or 128."
    if "fp8" in recipe.precisions.values():
        if old := [item for item in engine.capabilities if float(item) < FP8_SINCE]:
            yield f"'fp8' needs compute capability {FP8_SINCE} or newer: take {', '.join(old)} out of `capabilities`."
        if recipe.weights.rounding != "gptq":
            yield "'fp8' needs rounding = 'gptq': the range of what a matrix is fed is measured."
