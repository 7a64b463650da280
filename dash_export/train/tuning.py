"""Tuning by divergence: the bypasses, and with them the network, under the network's own decisions.

For a window at trade-off λ a rollout costs KL + λ * time. The bypasses follow the gradient of the KL. A decision has no
gradient; the network follows the straight-through one (Bengio et al. 2013, arXiv 1308.3432): forward takes the
decision, backward its softened form, sigmoid((limit - damage) / (SOFTNESS * limit)), so that every decision of a token
hears what it did to this token and, through the KV cache, to later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dash_export.train.corpus import Batch
from dash_export.train.gated_model import GatedModel, below
from dash_export.train.regression import draw_trade_offs
from dash_export.train.skip_modules import SkipModules
from dash_export.train.token_kl import summed_divergence

SOFTNESS = 0.3


@dataclass(frozen=True)
class Tuning:
    """One step's loss: (KL + λ * time) / λ, so that every trade-off of the range weighs alike."""

    model: GatedModel
    modules: SkipModules
    trade_offs: tuple[float, float]

    def loss(self, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        """The loss over one batch, with gradients for the bypasses and the network."""
        ids, dense, counted = self.model.tensors(batch)
        drawn = torch.from_numpy(draw_trade_offs(rng, len(ids), self.trade_offs)).to(self.model.device)[:, None]
        cost = self.modules.cost(self.model.spec)
        limits = drawn[..., None] * cost
        with torch.no_grad():
            final = self.model.dense(ids)[counted]

        rollout = self.model.rollout(
            ids,
            self.modules,
            below(limits),
            dense,
            soften=lambda damage: torch.sigmoid((limits - damage) / (SOFTNESS * limits)),
        )
        weight = (1 / drawn).expand(ids.shape)[counted] / counted.sum()
        loss = summed_divergence(self.model.head, final, rollout.final[counted], weight)
        return loss - (rollout.taken[counted] @ cost).mean()


@dataclass(frozen=True)
class StaticTuning:
    """The bypasses of a static policy: KL under the first units of its order, how many drawn per window up to those of
    half of the model's layers.
    """

    model: GatedModel
    modules: SkipModules
    order: tuple[int, ...]

    def loss(self, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        """The loss over one batch, with gradients for the bypasses."""
        device = self.model.device
        ids, dense, counted = self.model.tensors(batch)
        sizes = [len(self.modules.units[place].layers) for place in self.order]
        largest = max(1, int((np.cumsum(sizes) <= self.model.spec.num_layers / 2).sum()))
        counts = rng.integers(1, largest + 1, len(ids))
        rank = np.argsort(self.order)
        skipped = torch.from_numpy(rank < counts[:, None]).to(device)[:, None]
        with torch.no_grad():
            final = self.model.dense(ids)[counted]
        rollout = self.model.rollout(ids, self.modules, lambda damage: skipped.expand(damage.shape), dense)
        weight = torch.full((len(final),), 1 / len(final), device=device)
        return summed_divergence(self.model.head, final, rollout.final[counted], weight)
