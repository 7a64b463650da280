"""Advice on what to do next: the command that gets a bundle its token policy, how long that takes and what it gains;
the target that suits a model stored in few bits.
"""

from math import log
from pathlib import Path
from shlex import quote

from dash_export.bundle.layout import DEFAULT_TARGET, GGUF_TARGET
from dash_export.bundle.records import Manifest, ModelFacts
from dash_export.files.resources import resource_folder

_ANCHORS = ((0.135e9, 6, 10), (0.494e9, 20, 11), (1.54e9, 60, 11))
"""Models by their parameters: minutes of `train --effort quick` on 2 cores, and per cent of the decode time that a
policy trained at full length saves for 2 % of perplexity.
"""


def shipped_policies() -> list[str]:
    """Return the names of the trained policies that come with this package."""
    return sorted(file.stem for file in resource_folder("calibration").glob("*.safetensors"))


def quick_training(parameters: int) -> tuple[int, str]:
    """Return the minutes that `train --effort quick` takes on 2 cores, and what a training at full length gains: those
    of the model that is nearest in size, the minutes in proportion.
    """
    size, minutes, saved = min(_ANCHORS, key=lambda anchor: abs(log(parameters / anchor[0])))
    gain = f"about {saved} % of the decode time for 2 % of perplexity"
    return max(1, round(minutes * parameters / size)), gain


def policy_command(model: ModelFacts, source: str | None = None) -> str:
    """Return one sentence with the command that gets the model a token policy, at its end. `source`: the model as the
    user gave it; None where that is not known.
    """
    given = "MODEL" if source is None else quote(source)
    for name in shipped_policies():
        if model.name.lower().startswith(name):
            return f"One for this model comes with this package: dash-export build {given} --policy {name}"
    minutes, gain = quick_training(model.parameters)
    name = "NAME" if source is None else Path(source).absolute().name.removesuffix(".gguf")
    expected = f"Train one (about {minutes} minutes on 2 cores; trained at full length it saves {gain})"
    return f"{expected}: dash-export train {given} -o {quote(f'{name}.safetensors')} --effort quick"


def if_without_policy(manifest: Manifest, source: str | None = None) -> str:
    """Return what to do about a bundle that has neither a trained policy nor was asked to have none; else ""."""
    policy = manifest.policy
    if policy.has_network or policy.static_order or not policy.units:
        return ""
    return f"No token policy: every token runs every layer. {policy_command(manifest.model, source)}"


_FEW_BITS = 8
"""Bits per weight, on average, below which a model is stored in blocks of 4 to 6 bits: Q8_0 has 8.5."""
_CALIBRATION = (1.54e9, 35, 1.4)
"""Weights, the minutes that calibrating their int4 takes on 2 cores, and the power of the weights by which these grow:
to factor a matrix's moments takes the cube of its inputs.
"""


def is_in_few_bits(manifest: Manifest) -> bool:
    """Return whether the model is stored in 4 to 6 bits per weight, as GGUF files are."""
    return suitable_target(manifest) == GGUF_TARGET


def suitable_target(manifest: Manifest) -> str:
    """Return the CPU target for a model that nothing else is known about."""
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
