"""Targets that suit a model, by the bits it is stored in."""

from dash_export.bundle.layout import DEFAULT_TARGET, GGUF_TARGET
from dash_export.bundle.records import Manifest

_FEW_BITS = 8
"""Bits per weight, on average, below which a model is stored in blocks of 4 to 6 bits: Q8_0 has 8.5."""
_CALIBRATION = (1.54e9, 35, 1.4)
"""Weights, the minutes that calibrating their int4 takes on 2 cores, and the power of the weights by which these grow.
"""


def is_in_few_bits(manifest: Manifest) -> bool:
    """Return whether the model is stored in 4 to 6 bits per weight, as GGUF files are."""
    return suitable_target(manifest) == GGUF_TARGET


def suitable_target(manifest: Manifest) -> str:
    """Return the CPU target for a model that nothing else is known about."""
    if manifest.model.decides == "input":
        return "portable"
    weights = ("onnx/layer_", "onnx/embed.data", "onnx/head.data")
    stored = sum(record.bytes for record in manifest.files if record.name.startswith(weights))
    return target_of_bits(8 * stored / manifest.model.parameters)


def target_of_bits(bits: float) -> str:
    """Return that target for a model that is stored in so many bits per weight, on average."""
    return GGUF_TARGET if bits < _FEW_BITS else DEFAULT_TARGET


def calibration_minutes(parameters: int) -> int:
    """Return how long the calibration of int4 takes on 2 cores."""
    size, minutes, power = _CALIBRATION
    return max(1, round(minutes * float((parameters / size) ** power)))
