"""A pruned model against the oracle of the whole one, which skips the same units at every token."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.policy import no_policy
from dash_export.core.units import Unit, layer_actions
from dash_export.errors import PolicyError
from dash_export.models.bypasses import pruned
from dash_export.reference import Oracle
from tests.tiny import TINY_UNITS, random_ids, tiny_checkpoint, tiny_policy

pytestmark = pytest.mark.usefixtures("unmeasured")

WINDOWS = ["full_attention", *["sliding_attention", "full_attention"] * 2, "sliding_attention"]


CASES = {
    "two units behind one layer": ("llama", (0, 1), {}),
    "layers with windows": ("gemma3_text", (0,), {"head_dim": 16, "sliding_window": 5, "layer_types": WINDOWS}),
    "layers that do not turn": ("smollm3", (1,), {"pad_token_id": 0, "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    "by default": ("smollm3", (0,), {"pad_token_id": 0}),
    "norms after": ("olmo2", (0, 1), {"pad_token_id": 0}),
}


@pytest.mark.parametrize(("family", "places", "options"), CASES.values(), ids=CASES)
def test_is_the_model_that_always_skips(
    tmp_path: Path, family: str, places: tuple[int, ...], options: dict[str, Any]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **options)
    if "no_rope_layers" not in options:  # as a GGUF file has it: the family's default, every fourth layer
        config = {key: value for key, value in checkpoint.config.items() if key != "no_rope_layers"}
        checkpoint = replace(checkpoint, config=config)
    policy, ids = tiny_policy(checkpoint, "linear"), random_ids(24)
    skipped = np.zeros((len(TINY_UNITS), len(ids)), np.bool_)
    skipped[list(places)] = True
    expected = Oracle(checkpoint, policy).forward(ids, actions=layer_actions(skipped, TINY_UNITS, 6)).logits
    smaller = pruned(checkpoint, policy, [TINY_UNITS[place] for place in places])
    layers = smaller.spec.num_layers
    assert layers == 6 - sum(len(TINY_UNITS[place].layers) for place in places)
    none = no_policy(layers, ())
    np.testing.assert_allclose(Oracle(smaller, none).forward(ids).logits, expected, atol=1e-4)
    bundle = export(smaller, tmp_path / "a.dash", none)
    build(bundle, "cpu", weights="fp32")
    runtime = DashRuntime.load(bundle.root, "cpu-fp32")
    np.testing.assert_allclose(runtime.session().logits(ids), expected, atol=1e-3)
    assert json.loads((bundle.root / "config.json").read_text())["num_hidden_layers"] == layers


def test_what_cannot_be_pruned(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(PolicyError, match=r"Unit 2-3 has a bypass without weights"):
        pruned(checkpoint, tiny_policy(checkpoint), [TINY_UNITS[0]])
    with pytest.raises(PolicyError, match=r"Layers 2 are not whole units. Units of this policy: 2-3,4"):
        pruned(checkpoint, tiny_policy(checkpoint, "linear"), [Unit(2, 2)])
