"""Exits of an encoder, and when a picture leaves at one (numpy only).

The units of an encoder's policy follow each other up to the last layer. Skipping one means leaving: all units behind it
are skipped, too, and one product of the state gives the answer. x = [class token, mean of the patches], each normed
without gain (the mean alone where there is no class token):

    answer[u] = [pooled vector | class logits] = x @ weight + bias

Whether to leave is decided at each exit, by how far the exits' own answers still move: `moves` are the logarithms of
1 - cosine of this answer with the mean answer and with those of up to three exits before, and their squares. From these
a linear network knows the damage of leaving here and at every later exit,

    d[u], d[u + 1], ... = exp(moves . weight[u] + bias[u])

and the damage of the unit is what leaving here, not at the later exit (or the end, where d = 0) that is best, adds per
layer saved, times the unit's layers:

    damage[u] = layers(u) * max over v of (d[u] - d[v]) / (first(v) - first(u))

So the rule of all policies decides: a picture leaves at the first unit with damage < trade_off * cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.core.units import Unit, units_text
from dash_export.errors import PolicyError

Floats = npt.NDArray[np.floating[Any]]

BEFORE = 3
"""Answers of exits before that one compares its own with."""
MOVES = 2 * (1 + BEFORE)
LEAST = 1e-6
"""Least divergence of two answers: float32 knows no less."""
MOST = 2.0
"""Bound of the logarithm of damage, which is never over log 2."""


def check_exits(units: Sequence[Unit], num_layers: int) -> None:
    """Raise PolicyError unless each unit begins where the one before ends, and the last one ends with the model."""
    ends = [*(unit.first for unit in units[1:]), num_layers]
    if any(unit.last + 1 != end for unit, end in zip(units, ends, strict=False)):
        raise PolicyError(
            f"The units {units_text(units):.200} must follow each other up to layer {num_layers - 1}: a picture that "
            "leaves an encoder skips all that comes behind. Train it again, or give such --units."
        )


def moves(answer: Floats, before: Sequence[Floats], centre: Floats) -> Floats:
    """Return the moves [n, MOVES] of an answer [n, hidden]. `before`: the answers of the exits before, last one first;
    0 for those that there are not.
    """
    gaps = [np.log(gap(answer, other) + LEAST) for other in (centre[None], *before[:BEFORE])]
    gaps += [np.zeros(len(answer))] * (1 + BEFORE - len(gaps))
    return np.stack([*gaps, *(each * each for each in gaps)], axis=1)


def gap(left: Floats, right: Floats) -> Floats:
    """Return 1 - cosine of the rows of two arrays [n, hidden]: half the square of the distance of unit vectors, which
    is exact for small ones.
    """
    apart = normalized(left) - normalized(right)
    found: Floats = 0.5 * (apart * apart).sum(axis=1)
    return found


def normalized(vectors: Floats) -> Floats:
    """Return vectors [..., hidden] of length 1; a vector of zeros stays one."""
    found: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return found


def per_layer(place: int, units: Sequence[Unit], num_layers: int) -> npt.NDArray[np.float32]:
    """Return the matrix [later, later] that makes differences, per layer saved and times the unit's layers, of the
    damages of leaving at unit `place` and at each one behind it, the end of the model last.
    """
    firsts = [*(unit.first for unit in units[place:]), num_layers]
    own = len(units[place].layers) / (np.array(firsts[1:]) - firsts[0])
    matrix = -np.eye(len(own), k=-1) * own
    matrix[0] += own
    return matrix.astype(np.float32)


def leaving_damage(logs: Floats, place: int, units: Sequence[Unit], num_layers: int) -> Floats:
    """Return the damage [n] of unit `place` for logarithms of damage [n, later] of it and those behind it."""
    found: Floats = (np.exp(np.minimum(logs, MOST)) @ per_layer(place, units, num_layers)).max(axis=1)
    return found
