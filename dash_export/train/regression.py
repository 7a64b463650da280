"""Damage regression: the network learns what skipping costs from forward passes alone.

The target is the divergence of a skipped pass from the dense one, per token; the prediction is the sum of the damages
of the units that token skipped:

    loss = (sqrt(sum of damages + SOFTENING) - sqrt(KL + SOFTENING))^2

Half of the windows skip at random, independently per token and unit, at a rate drawn per window: the exploration that
tells units apart. The other half follow the network as it is, at a trade-off drawn per window, with some of their
decisions replaced by random ones: what the policy will meet, over the whole dial. Thresholding the result is the
one-step greedy policy of the Markov decision process (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dash_export.train.corpus import Batch
from dash_export.train.gated_model import Decide, GatedModel
from dash_export.train.skip_modules import SkipModules
from dash_export.train.token_kl import divergence

SOFTENING = 0.02
"""Nats. The square root evens out errors of small and large divergences; this keeps its slope finite at zero."""
LARGEST_RATE = 0.6
EXPLORATION = 0.1
MASKS = 2


@dataclass(frozen=True)
class Regression:
    """`MASKS` skipped passes are compared with each dense one; trade-offs are drawn log-uniformly from `trade_offs`
    (nats per dense token time).
    """

    model: GatedModel
    modules: SkipModules
    trade_offs: tuple[float, float]

    def loss(self, batch: Batch, rng: np.random.Generator, on_policy: bool = True) -> torch.Tensor:
        """The loss over one batch, with a gradient for the network's weights."""
        ids, dense, counted = self.model.tensors(batch)
        final = self.model.dense(ids)[counted]
        ids, dense, counted = (tensor.repeat(MASKS, 1) for tensor in (ids, dense, counted))
        decide = self._decide(tuple(ids.shape), rng, on_policy)
        rollout = self.model.rollout(ids, self.modules, decide, dense, network_grad=True)
        kl = divergence(self.model.head, final.repeat(MASKS, 1), rollout.final[counted], ids[counted]).kl
        predicted = (rollout.damage * rollout.skipped).sum(-1)[counted]
        return ((predicted + SOFTENING).sqrt() - (kl.clamp_min(0) + SOFTENING).sqrt()).pow(2).mean()

    def _decide(self, shape: tuple[int, ...], rng: np.random.Generator, on_policy: bool) -> Decide:
        windows, device = shape[0], self.model.device
        rates = rng.random((windows, 1, 1), dtype=np.float32) * LARGEST_RATE
        trade_offs = torch.from_numpy(draw_trade_offs(rng, windows, self.trade_offs)).to(device)
        drawn = rng.random((2, *shape, len(self.modules.units)), dtype=np.float32)
        random = (np.arange(windows) % 2 == 0)[:, None, None] | (not on_policy)
        free = torch.from_numpy(drawn[0] < rates).to(device)
        replaced = torch.from_numpy((drawn[1] < EXPLORATION) | random).to(device)
        limits = trade_offs[:, None, None] * self.modules.cost(self.model.spec)
        return lambda damage: torch.where(replaced, free, damage < limits)


def draw_trade_offs(rng: np.random.Generator, count: int, bounds: tuple[float, float]) -> np.ndarray:
    """Log-uniform trade-offs, float32 [count]."""
    low, high = np.log(bounds)
    return np.exp(rng.uniform(low, high, count)).astype(np.float32)
