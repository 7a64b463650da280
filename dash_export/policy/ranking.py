"""The order in which a static policy gives layers up: the one that hurts least, then the best one to add, and so on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.policy.corpus import Batch
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy.token_kl import divergence

CANDIDATES = 8
"""A greedy step tries this many layers, the least damaging alone."""


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


def single_damages(
    model: GatedModel, modules: SkipModules, windows: Sequence[Judged], progress: Progress = no_progress
) -> np.ndarray:
    """Mean KL (nats per token) of skipping each gated layer alone, [gated]."""
    damages = []
    for row in range(len(modules.gated)):
        damages.append(static_damage(model, modules, {row}, windows))
        progress("each layer skipped alone", row + 1, len(modules.gated))
    return np.array(damages)


def greedy_order(
    model: GatedModel,
    modules: SkipModules,
    windows: Sequence[Judged],
    singles: np.ndarray,
    progress: Progress = no_progress,
) -> tuple[int, ...]:
    """All gated layers, each the best of the CANDIDATES to add to those before it."""
    ranked = [int(row) for row in np.argsort(singles, kind="stable")]
    chosen = [ranked.pop(0)]
    while ranked:
        # The last few are not worth a search: nobody skips nearly everything.
        tried = ranked[:CANDIDATES] if len(chosen) < len(modules.gated) // 2 else ranked[:1]
        damages = [static_damage(model, modules, {*chosen, row}, windows) for row in tried] if len(tried) > 1 else [0.0]
        best = tried[int(np.argmin(damages))]
        ranked.remove(best)
        chosen.append(best)
        progress("static order", len(chosen), len(modules.gated))
    return tuple(modules.gated[row] for row in chosen)


@torch.no_grad()
def static_damage(model: GatedModel, modules: SkipModules, rows: set[int], windows: Sequence[Judged]) -> float:
    """Mean KL of skipping these gated layers (by row) for every token past the prefix."""
    total, count = 0.0, 0
    for each in windows:
        ids, counted = each.ids, each.counted
        skipped = model.rollout(
            ids, modules, lambda row, damage: torch.full_like(damage, row in rows).bool(), each.dense
        )
        kl = divergence(model.head, each.final, skipped.final[counted], ids[counted]).kl
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count
