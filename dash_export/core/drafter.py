"""The drafter of kind `layer`: the bypass of the whole stack, which guesses the token after the next one (numpy only).

Of the newest token x, not yet run through the model, it takes the embedding e (as it enters the first layer), and of
the token before the normed final state f. The stand-in for all layers but the last is linear; then a layer in the form
of the model's last one, and the model's final norm and head follow:

    h = f @ state.T + RMSNorm(e) @ embedding.T          (RMSNorm of unit gain and the model's epsilon)
    s = RMSNorm(layer(h)) * norm                        (the estimate of x's own normed final state)
    draft, chance = the likeliest of the model's logits of s among `tokens`, and its probability among them

The layer attends to the K and V that the model's last layer has in the cache, so a drafter has no cache of its own, and
nothing is to be done for a prompt. Its own K and V go into the row of x, which is free until the model runs x and
overwrites it. A further draft takes s in the place of f, and the draft as x, one row later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from dash_export.errors import PolicyError

Float32Array = npt.NDArray[np.float32]

STATE, EMBEDDING, NORM, LAYER = "state.weight", "embedding.weight", "norm.weight", "layer."
"""Names of a drafter's weights; those of its layer follow LAYER as they follow `model.layers.N.` in the model."""
LEAST_TOKENS = 16
BLOCK = 32
"""Inputs of a matrix whose codes share a scale in a file."""
LARGEST = float(np.finfo(np.float16).max)
"""Bound of the magnitude of a weight: a bundle keeps them in float16."""


@dataclass(frozen=True)
class Drafter:
    """Weights by name, float32; matrices are [out, in]. `tokens` int64 [V], rising: the short vocabulary. A
    draft's chance to be accepted is sigmoid(slope * logit(probability) + offset). `origin` says who made it.
    """

    weights: Mapping[str, Float32Array]
    tokens: npt.NDArray[np.int64]
    slope: float = 1.0
    offset: float = 0.0
    origin: str = "untrained"


def check_drafter(drafter: Drafter, shapes: Mapping[str, tuple[int, ...]], vocabulary: int) -> None:
    """Raise PolicyError where the drafter is not one for a model with these shapes of a drafter's weights (none: there
    is no drafter for it) and so many tokens, or holds a number that is none.
    """
    if not shapes:
        raise PolicyError("It holds a drafter, and this model writes no text: there is nothing to draft.")
    found, tokens = drafter.weights, drafter.tokens
    if missing := shapes.keys() - found.keys():
        raise PolicyError(f"The drafter lacks {min(missing)}.")
    if unknown := found.keys() - shapes.keys():
        raise PolicyError(f"The drafter holds {min(unknown):.60}, which is nothing of ours.")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise PolicyError(f"The drafter's {name} has shape {list(found[name].shape)}; {list(shape)} was expected.")
        if not np.abs(found[name]).max() <= LARGEST:
            raise PolicyError(f"The drafter's {name} holds NaN, infinity or a number over {LARGEST:.0f}.")
    if not drafter.origin or not (isfinite(drafter.slope) and isfinite(drafter.offset)):
        raise PolicyError("The drafter does not say who made it, or its slope or offset is no number.")
    if tokens.ndim != 1 or not LEAST_TOKENS <= len(tokens) <= vocabulary:
        raise PolicyError(f"The drafter's tokens must be a list of {LEAST_TOKENS} to {vocabulary}.")
    if tokens[0] < 0 or tokens[-1] >= vocabulary or (np.diff(tokens) <= 0).any():
        raise PolicyError(f"The drafter's tokens must rise from 0 on to below {vocabulary}: another vocabulary's?")


def in_codes(matrix: Float32Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Return int8 codes of a matrix [out, in], and the scale of each BLOCK of a row [out, blocks]."""
    starts = np.arange(0, matrix.shape[1], BLOCK)
    scales = (np.maximum.reduceat(np.abs(matrix), starts, axis=1) / 127).astype(np.float16)
    whole = _spread(scales, matrix.shape[1])
    codes = np.divide(matrix, whole, out=np.zeros_like(matrix), where=whole > 0)
    return np.clip(np.rint(codes), -127, 127).astype(np.int8), scales


def from_codes(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.floating]) -> Float32Array:
    """Return the matrix of these codes and scales. Raises PolicyError where they do not go together."""
    if codes.ndim != 2 or scales.shape != (len(codes), -(-codes.shape[1] // BLOCK)):
        raise PolicyError(f"The drafter has scales {list(scales.shape)} for codes {list(codes.shape)}.")
    with np.errstate(invalid="ignore"):  # infinite scales, which a check finds
        return codes * _spread(scales, codes.shape[1])


def _spread(scales: npt.NDArray[np.floating], columns: int) -> Float32Array:
    return np.repeat(scales.astype(np.float32), BLOCK, axis=1)[:, :columns]
