"""The order in which a static policy gives units up: the one that hurts least for what it saves, then the best one to
add, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.train.corpus import Batch
from dash_export.train.gated_model import GatedModel, always
from dash_export.train.skip_modules import SkipModules
from dash_export.train.token_kl import divergence

TRIED = 8
"""A greedy step tries this many units, the best alone."""


@dataclass(frozen=True)
class Judged:
    """Windows, and what the dense model makes of them: its normed last states at the counted positions."""

    ids: torch.Tensor
    dense: torch.Tensor
    counted: torch.Tensor
    final: torch.Tensor


@torch.no_grad()
def judged(model: GatedModel, batches: Iterable[Batch]) -> list[Judged]:
    """The dense pass over each batch, once for all the sets that are tried."""
    found = []
    for batch in batches:
        ids, dense, counted = model.tensors(batch)
        found.append(Judged(ids, dense, counted, model.dense(ids)[counted]))
    return found


@torch.no_grad()
def static_damage(
    model: GatedModel, modules: SkipModules, places: Sequence[int], windows: Sequence[Judged]
) -> torch.Tensor:
    """KL (nats) of every counted token where all skip these units, [tokens]."""
    found = []
    for each in windows:
        rollout = model.rollout(each.ids, modules, always(len(modules.units), places), each.dense)
        final, counted = rollout.final[each.counted], each.counted
        found.append(divergence(model.head, each.final, final, each.ids[counted]).kl)
    return torch.cat(found)


def greedy_order(
    model: GatedModel, modules: SkipModules, windows: Sequence[Judged], progress: Progress = no_progress
) -> tuple[int, ...]:
    """Places of all units, each the one of TRIED that adds least damage a layer to those before it."""
    sizes, done = [len(unit.layers) for unit in modules.units], 0

    def damage(*places: int) -> float:
        nonlocal done
        done += 1
        progress("static order", done, ranking_work(len(sizes)))
        return float(static_damage(model, modules, places, windows).mean())

    alone = [damage(place) for place in range(len(sizes))]
    left = sorted(range(len(sizes)), key=lambda place: alone[place] / sizes[place])
    chosen = [left.pop(0)]
    known = alone[chosen[0]]
    while len(chosen) < _searched(len(sizes)):
        totals = {place: damage(*chosen, place) for place in left[:TRIED]}
        best = min(totals, key=lambda place: (totals[place] - known) / sizes[place])
        left.remove(best)
        chosen.append(best)
        known = totals[best]
    return (*chosen, *left)


def ranking_work(units: int) -> int:
    """How many sets are judged to rank so many units."""
    return units + sum(min(TRIED, units - chosen) for chosen in range(1, _searched(units)))


def _searched(units: int) -> int:
    """Places of the order that are searched for: nobody skips nearly everything."""
    return (units + 1) // 2
