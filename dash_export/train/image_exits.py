"""Exits of an encoder's policy in closed form: their answers, what predicts the damage of leaving, and the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dash_export.core.exits import MOVES, leaving_damage, moves
from dash_export.core.policy import Weights, half
from dash_export.core.units import Unit
from dash_export.train.image_passes import Floats, divergence, unit_normed

Doubles = npt.NDArray[np.float64]

FOLDS = 5
"""Parts of the pictures; what is learnt from the answers takes those of exits that have not seen the picture."""
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridges of an exit that are tried, of the mean square of what it reads; the one that answers unseen pictures best."""
SCORE_RIDGE = 0.03
LEAST_DAMAGE = 1e-5


def exit_read(state: Floats, special: int, epsilon: float) -> Floats:
    """Return what an exit reads [n, features] of a state: class token and mean of the patches, each normed."""
    mean = unit_normed(state[:, special:].mean(axis=1), epsilon)
    found: Floats = np.concatenate([unit_normed(state[:, 0], epsilon), mean], axis=1) if special else mean
    return found


def guard_read(state: Floats, special: int, epsilon: float) -> Floats:
    """Return what the guard reads [n, features] of a state [n, tokens, hidden]: the class token, mean and spread of the
    patches, all normed without gain (the formula of `graphs/portable/encoder_graphs.py`).
    """
    read = unit_normed(state, epsilon)
    patches = read[:, special:]
    parts = [patches.mean(axis=1), patches.std(axis=1)]
    found: Floats = np.concatenate([read[:, 0], *parts] if special else parts, axis=1)
    return found


def regression(x: Floats, y: Floats, ridge: float) -> dict[str, Floats]:
    """Return weight and bias of y = x @ weight + bias. `ridge` is relative to the mean square of what x varies."""
    centre, aim = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    apart = x - centre
    gram = apart.T @ apart
    gram += ridge * gram.trace() / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram, apart.T @ (y - aim))
    found = {"weight": weight, "bias": aim - centre @ weight}
    return {name: array.astype(np.float32) for name, array in found.items()}


def applied(weights: Weights, x: Floats) -> Floats:
    """Return x @ weight + bias, with the weight in the numbers that a bundle keeps."""
    found: Floats = x @ half(weights["weight"]) + weights["bias"]
    return found


def folded(fit: Callable[[npt.NDArray[np.bool_]], Weights], x: Floats, columns: int) -> Floats:
    """Return the answers [n, columns] to pictures that a fit has not seen. `fit(learnt)` makes weights."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    found = np.empty((len(x), columns), np.float32)
    for number in range(FOLDS):
        found[fold == number] = applied(fit(fold != number), x[fold == number])
    return found


def fitted_exit(x: Floats, ends: Floats, hidden: int) -> tuple[dict[str, Floats], Floats]:
    """Return an exit, and the pooled vectors that it would give to pictures that it has not seen. `ends` [n, columns]:
    the pooled vector of `hidden` numbers, then what else the head gives.
    """

    def unseen(ridge: float) -> Floats:
        return folded(lambda learnt: regression(x[learnt], ends[learnt], ridge), x, ends.shape[1])[:, :hidden]

    answers = {ridge: unseen(ridge) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: float(divergence(ends[:, :hidden], answers[ridge]).mean()))
    return regression(x, ends, best), answers[best]


def fitted_scores(
    answers: Sequence[Floats], dense: Floats, centre: Floats
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the weight [units, MOVES, units] and bias [units, units] that tell logarithms of damage from moves.
    `answers` [n, hidden]: the first one, then one per unit; `dense` [n, hidden]: what they should be.
    """
    units = len(answers) - 1
    weight, bias = np.zeros((units, MOVES, units), np.float32), np.zeros((units, units), np.float32)
    logs = np.log(np.stack([divergence(dense, each) for each in answers[1:]], axis=1) + LEAST_DAMAGE)
    for place in range(units):
        read = moves(answers[place + 1], answers[place::-1], centre)
        scale = np.maximum(read.std(axis=0), 1e-6)
        known = scale > 1e-6  # not the answers that there are not
        found = regression((read / scale)[:, known], logs[:, place:], SCORE_RIDGE)
        weight[place, known, place:] = found["weight"] / scale[known, None]
        bias[place, place:] = found["bias"]
    return weight, bias


def answered(
    policy_network: Weights, bypasses: Sequence[Weights], read: Mapping[int, Floats], early: Floats,
    units: Sequence[Unit], num_layers: int,
) -> tuple[Doubles, list[Floats]]:  # fmt: skip
    """Return the damage [units, n] that the policy sees, and what each exit gives [n, columns]. `read[layer]`: what
    exits read of the state that enters it, `early` of the state that gives the first answer.
    """
    network, hidden = policy_network, len(policy_network["centre"])
    answers = [applied({name: network[f"early.{name}"] for name in ("weight", "bias")}, early)]
    found, damage = [], []
    for place, (unit, bypass) in enumerate(zip(units, bypasses, strict=True)):
        found.append(applied(bypass, read[unit.first]))
        answers.insert(0, found[-1][:, :hidden])
        score = moves(answers[0], answers[1:], network["centre"]) @ network["weight"][place] + network["bias"][place]
        damage.append(leaving_damage(score[:, place:], place, units, num_layers))
    return np.array(damage, np.float64), found


def fitted_guard(features: Floats, components: int) -> dict[str, Floats]:
    """Return the guard: principal components of the features, of unit variance. `limit` is still infinite."""
    mean = features.mean(axis=0, dtype=np.float64)
    _, spread, axes = np.linalg.svd(features - mean, full_matrices=False)
    kept = min(components, len(features) // 4)
    scale = spread[:kept] / np.sqrt(len(features) - 1)
    found = {"mean": mean, "components": axes[:kept].T / np.maximum(scale, 1e-9), "spread": scale}
    found["limit"] = np.full(2, np.inf)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def distances(guard: Weights, features: Floats) -> Doubles:
    """Return distances [n, 2] from the pictures that the guard learnt from: mean square of the components, and the
    square of what lies outside of them.
    """
    centred = (features - guard["mean"]).astype(np.float64)
    read = centred @ guard["components"].astype(np.float64)
    outside = (centred**2).sum(axis=1) - ((read * guard["spread"]) ** 2).sum(axis=1)
    return np.stack([(read * read).mean(axis=1), outside], axis=1)
