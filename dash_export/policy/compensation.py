"""The compensation in closed form: regression of each layer's update on what a skip graph has at hand.

`low_rank`: the layer's update u = layer(h) - h on x = RMSNorm(h), as reduced-rank ridge regression (Izenman 1975):
with B = (X'X + ridge)^-1 X'U, the best map of rank r is B V V', V the first r eigenvectors of B'X'XB. `scale`: the
factor that minimises |u - factor * h|^2. All of it needs sums over tokens only, so memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dash_export.policy.corpus import Batch
from dash_export.policy.gated_model import GatedModel
from dash_export.skip_policy import Compensation

RIDGE = 1e-3
"""Per token and unit of x, whose mean square is 1."""


class UpdateStatistics:
    """Sums over the tokens seen, per layer: X'X, X'U, and what `scale` and the cosine ranking need (float64)."""

    def __init__(self, model: GatedModel, layers: Sequence[int]) -> None:
        hidden = model.spec.hidden_size
        self._model = model
        self.layers = tuple(layers)
        self.count = 0
        self._xx = {layer: torch.zeros(hidden, hidden, dtype=torch.float64) for layer in layers}
        self._xu = {layer: torch.zeros(hidden, hidden, dtype=torch.float64) for layer in layers}
        self._hh = dict.fromkeys(layers, 0.0)
        self._hu = dict.fromkeys(layers, 0.0)
        self._cosine = dict.fromkeys(layers, 0.0)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """One dense pass over the batch; only tokens that count are taken."""
        counted = torch.from_numpy(batch.counted).to(self._model.device)
        self.count += int(counted.sum())
        for layer, before, after in self._model.dense_layers(torch.from_numpy(batch.ids).to(self._model.device)):
            if layer not in self._xx:
                continue
            h = before[counted].float()
            u = after[counted].float() - h
            x = self._model.normed(h)
            self._xx[layer] += (x.T @ x).double().cpu()
            self._xu[layer] += (x.T @ u).double().cpu()
            self._hh[layer] += float((h * h).sum())
            self._hu[layer] += float((h * u).sum())
            self._cosine[layer] += float(torch.nn.functional.cosine_similarity(h, h + u, dim=-1).sum())

    def cosine_order(self) -> tuple[int, ...]:
        """Layers by mean cosine similarity of input and output, most redundant first (ShortGPT's block influence)."""
        return tuple(sorted(self.layers, key=lambda layer: -self._cosine[layer]))

    def scale(self) -> Compensation:
        """factor [layers] = sum h.u / sum h.h."""
        return Compensation(
            "scale", {"factor": np.array([self._hu[layer] / self._hh[layer] for layer in self.layers], np.float32)}
        )

    def low_rank(self, rank: int) -> Compensation:
        """down [layers, hidden, rank], up [layers, rank, hidden], scaled alike so that one learning rate fits both."""
        downs, ups = [], []
        for layer in self.layers:
            xx = self._xx[layer]
            ridge = torch.eye(len(xx), dtype=torch.float64) * self.count * RIDGE
            full = torch.linalg.solve(xx + ridge, self._xu[layer])
            _, vectors = torch.linalg.eigh(full.T @ xx @ full)
            basis = vectors[:, -rank:]
            left, middle, right = torch.linalg.svd(full @ basis @ basis.T, full_matrices=False)
            root = middle[:rank].sqrt()
            downs.append((left[:, :rank] * root).float().numpy())
            ups.append((root[:, None] * right[:rank]).float().numpy())
        return Compensation("low_rank", {"down": np.stack(downs), "up": np.stack(ups)})
