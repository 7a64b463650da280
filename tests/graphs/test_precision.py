"""Which part of a recipe a matrix obeys."""

from __future__ import annotations

import pytest

from dash_export.graphs.rounded import weight_precision
from dash_export.targets import WeightsRecipe

GATED = (3, 4)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("layer_03/mlp/down_proj", "int4"),
        ("layer_03/attention/q_proj+k_proj+v_proj", "int8"),
        ("layer_03/attention/o_proj", "int4"),
        ("bypass_03-04/product", "int8"),
        ("layer_00/update_0", "int8"),
        ("layer_00/mlp/up_proj", "int4"),
        ("layer_00/attention/v_proj", "int8"),
        ("head/logits", "int4"),
    ],
)
def test_parts(node: str, expected: str) -> None:
    recipe = WeightsRecipe(layers="int4", qkv="int8", ungated="int4", head="int4", bypass="int8")
    assert weight_precision(node, recipe, GATED) == expected


def test_qkv_is_at_least_as_fine_as_its_layer() -> None:
    recipe = WeightsRecipe(layers="fp32", qkv="int8", ungated="int8")
    assert weight_precision("layer_03/attention/q_proj", recipe, GATED) == "fp32"
    assert weight_precision("layer_00/attention/q_proj", recipe, GATED) == "int8"
