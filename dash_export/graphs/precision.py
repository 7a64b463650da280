"""Which part of the recipe a weight obeys, told by its node's name: the same for every backend."""

from __future__ import annotations

from collections.abc import Collection

from dash_export.targets import Precision, WeightsRecipe

FINEST_FIRST: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int4")


def weight_precision(node: str, recipe: WeightsRecipe, gated: Collection[int]) -> Precision:
    """The precision of a node's weights; a layer's nodes are named `layer_NN/...`, a unit's bypass `bypass_AA-BB/...`.
    `gated`: the layers of all units.
    """
    part, _, rest = node.partition("/")
    if part == "head":
        return recipe.head
    if part == "policy" or part.startswith("bypass") or rest.startswith("update_"):
        return recipe.bypass
    precision = recipe.layers if int(part.rsplit("_", 1)[1]) in gated else recipe.ungated
    if rest.startswith(("attention/q_proj", "attention/k_proj", "attention/v_proj")):
        return min(precision, recipe.qkv, key=FINEST_FIRST.index)
    return precision
