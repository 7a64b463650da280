"""Bypasses in closed form: ridge regression of a unit's outputs on the unit's input.

X is what a bypass reads (`bypass_input`), and a column of ones; Y is the unit's update and the K and V of its other
layers. Only sums over tokens are kept. Units that begin at the same layer share X'X and the sums of K and V.
"""

from collections.abc import Iterable

import torch

from dash_export.core.policy import Weights
from dash_export.core.units import Unit
from dash_export.models.torch_model import bypass_input
from dash_export.train.corpus import Batch
from dash_export.train.model import GatedModel

RIDGE = 1e-6
"""Ridge per token, on the diagonal of X'X: relative to the mean square of X."""


class Sums:
    """X'X and X'Y (float64, on the CPU) of `units`: 10 MB for a unit of four layers of a 135M, 300 of an 8B."""

    def __init__(self, model: GatedModel, units: Iterable[Unit]) -> None:
        self.units = tuple(units)
        self._model = model
        self.tensors: dict[tuple[int, str, int], torch.Tensor] = {}
        """By first layer, what is summed, and layer; in the same order in every process."""

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        model, counted = self._model, batch.counted
        entered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """First layer of a unit -> X and the unit's input."""
        for layer, before, after in model.dense_layers(batch.ids):
            open_units = [unit for unit in self.units if layer in unit.layers]
            keys_values = model.keys_values(layer, before[counted]).double() if entered and open_units else None
            for first in sorted({unit.first for unit in open_units}):
                if first == layer:
                    x = with_ones(bypass_input(before[counted].float(), model.spec).double())
                    entered[first] = (x, before[counted].double())
                    self._sum(first, "x", first, x, x)
                elif keys_values is not None:
                    self._sum(first, "keys and values", layer, entered[first][0], keys_values)
                if Unit(first, layer) in self.units:
                    x, hidden = entered[first]
                    self._sum(first, "update", layer, x, after[counted].double() - hidden)
            if layer == max(unit.last for unit in self.units):
                return

    def _sum(self, first: int, what: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        known, found = self.tensors.get((first, what, layer)), (x.T @ y).cpu()
        self.tensors[first, what, layer] = found if known is None else known.add_(found)

    def fit(self, unit: Unit) -> Weights:
        """Return the bypass of `unit`, which is one of `units`."""
        first, device = unit.first, self._model.device
        xy = [self.tensors[first, "update", unit.last]]
        xy += [self.tensors[first, "keys and values", layer] for layer in unit.layers[1:]]
        return solved(self.tensors[first, "x", first].to(device), torch.cat(xy, 1).to(device))


def with_ones(x: torch.Tensor) -> torch.Tensor:
    """Return x [tokens, columns] with a column of ones, whose weights are the bias."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def solved(xx: torch.Tensor, xy: torch.Tensor) -> Weights:
    """Return the ridge regression with these sums (float64) over tokens: X'X, of x `with_ones`, and X'Y."""
    xx = xx + RIDGE * xx.diagonal()[:-1].mean() * torch.eye(len(xx), dtype=torch.float64, device=xx.device)
    found = torch.linalg.solve(xx, xy).float().cpu().numpy()
    return {"weight": found[:-1].copy(), "bias": found[-1].copy()}
