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
ADDED = 0.5
"""How much of what is fitted beside a known compensation counts. That one was tuned by KL, and what it leaves of an
update is left on purpose in part: all of it made smollm2-135m-instruct worse by a quarter at rank 128, half by 3 %.
"""


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

    def low_rank(self, rank: int, known: Compensation | None = None) -> Compensation:
        """down [layers, hidden, rank], up [layers, rank, hidden], scaled alike so that one learning rate fits both.
        With a `known` low-rank compensation of these layers, that one and beside it, `ADDED` times, what is fitted to
        the rest of the updates, to `rank` in all.
        """
        downs, ups = [], []
        for row, layer in enumerate(self.layers):
            xx, xu, more = self._xx[layer], self._xu[layer], rank
            begun = [] if known is None else [known.weights["down"][row], known.weights["up"][row]]
            if begun:
                down, up = (torch.from_numpy(array).double() for array in begun)
                xu, more = xu - xx @ down @ up, rank - down.shape[1]
            ridge = torch.eye(len(xx), dtype=torch.float64) * self.count * RIDGE
            full = torch.linalg.solve(xx + ridge, xu)
            _, vectors = torch.linalg.eigh(full.T @ xx @ full)
            basis = vectors[:, -more:]
            left, middle, right = torch.linalg.svd(full @ basis @ basis.T, full_matrices=False)
            root = (middle[:more] * (ADDED if begun else 1.0)).sqrt()
            downs.append(np.hstack([*begun[:1], (left[:, :more] * root).float().numpy()]))
            ups.append(np.vstack([*begun[1:], (root[:, None] * right[:more]).float().numpy()]))
        return Compensation("low_rank", {"down": np.stack(downs), "up": np.stack(ups)})
