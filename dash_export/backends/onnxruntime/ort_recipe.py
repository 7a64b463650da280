"""Checks of a recipe for ONNX Runtime on a CPU."""

from collections.abc import Iterator

from dash_export.bundle.recipe import Recipe


def faults(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go together."""
    weights = recipe.weights
    if recipe.engine is not None:
        yield "an [engine] table is for GPU backends; onnxruntime has none."
    if recipe.dialect == "trt10":
        yield "dialect 'trt10' is for GPU backends; onnxruntime takes 'ort' or 'portable'."
    for part, value in recipe.precisions.items():
        if value in ("fp16", "bf16", "fp8"):
            yield f"{part} = {value!r}: on a CPU weights are 'fp32', 'int8' or 'int4'."
        if recipe.dialect == "portable" and value != "fp32":
            yield f"{part} = {value!r}: dialect 'portable' runs the graphs as they are, in 'fp32'."
    if weights.rounding == "as-is" and (weights.block_size != 32 or weights.symmetric):
        yield "rounding = 'as-is' takes blocks of 32 and zero points (symmetric = false): see --target cpu-gguf."
    if recipe.runtime.dispatch != "sync":
        yield f"dispatch {recipe.runtime.dispatch!r} needs a GPU backend."
