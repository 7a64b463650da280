"""Advice on how to get a token policy: the command, how long that takes and what it gains."""

from math import log
from pathlib import Path
from shlex import quote

from dash_export.core.facts import ModelFacts
from dash_export.core.policy import PolicyFacts
from dash_export.files.resources import resource_folder

_ANCHORS = ((0.135e9, 6, 2), (0.494e9, 20, 4), (1.54e9, 60, 4))
"""Models by their parameters: minutes of a `quick` training of skips on 2 cores, and per cent of the decode time that a
policy trained at full length saves for 2 % of perplexity of the model's own answers (1.5B: not measured, as 0.5B).
"""


def shipped_policies() -> list[str]:
    """Return the names of the trained policies that come with this package."""
    return sorted(file.stem for file in resource_folder("calibration").glob("*.safetensors"))


def quick_training(parameters: int) -> tuple[int, str]:
    """Return the minutes that a `quick` training of skips takes on 2 cores, and what one at full length gains: those of
    the model that is nearest in size, the minutes in proportion.
    """
    size, minutes, saved = min(_ANCHORS, key=lambda anchor: abs(log(parameters / anchor[0])))
    gain = f"about {saved} % of the decode time for 2 % of perplexity on its own answers"
    return max(1, round(minutes * parameters / size)), gain


def policy_command(model: ModelFacts, source: str | None = None) -> str:
    """Return one sentence with the command that gets the model a token policy, at its end. `source`: the model as the
    user gave it; None where that is not known.
    """
    given = "MODEL" if source is None else quote(source)
    if model.takes == "texts":
        return "No policy can be trained for a text encoder so far: it runs every layer."
    if model.decides == "input":
        return f"Train one from pictures like yours: dash-export train {given} --images DIR -o NAME.safetensors"
    for name in shipped_policies():
        if model.name.lower().startswith(name):
            return f"One for this model comes with this package: dash-export build {given} --policy {name}"
    minutes, gain = quick_training(model.parameters)
    name = "NAME" if source is None else Path(source).absolute().name.removesuffix(".gguf")
    expected = f"Train one (about {minutes} minutes on 2 cores; trained at full length it saves {gain})"
    return f"{expected}: dash-export train {given} -o {quote(f'{name}.safetensors')} --skips --effort quick"


def drafter_command(model: ModelFacts) -> str:
    """Return one sentence with the command that gets the model a trained drafter, at its end."""
    for name in shipped_policies():
        if model.name.lower().startswith(name):
            return f"One for this model comes with this package: dash-export build MODEL --policy {name}"
    return "Train one: dash-export train MODEL -o NAME.safetensors"


def if_without_policy(model: ModelFacts, policy: PolicyFacts, source: str | None = None) -> str:
    """Return what to do about a bundle that has neither a trained policy nor was asked to have none; else ""."""
    if policy.has_network or policy.static_order or not policy.units:
        return ""
    item = {"prompt": "token", "pictures": "picture", "texts": "text"}[model.takes]
    return f"No {item} policy: every {item} runs every layer. {policy_command(model, source)}"
