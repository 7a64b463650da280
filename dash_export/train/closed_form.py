"""Bypasses in closed form: ridge regression of what a unit does on what enters it.

With X the normed input of a unit's first layer and a column of ones, and Y its update and the K and V of its other
layers, the bypass is (X'X + ridge)^-1 X'Y. It needs sums over tokens only: memory does not grow with the text. Sums for
several units that begin at one layer share X'X and their K and V.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dash_export.decision import Unit
from dash_export.models.spec import DecoderSpec
from dash_export.policy import Bypass, key_value_size
from dash_export.train.corpus import Batch
from dash_export.train.model import GatedModel

RIDGE = 1e-6
"""Per token and unit of x, whose mean square is 1."""


class Sums:
    """X'X and X'Y (float64, on the CPU) per layer at which a unit begins, over the tokens that count: `sums_bytes`, 10
    MB for a unit of four layers of a 135M, 300 MB for one of an 8B.
    """

    def __init__(self, model: GatedModel, units: Iterable[Unit]) -> None:
        self._model = model
        self.units = tuple(units)
        self._lasts = _lasts(self.units)
        rows, self.count = model.spec.hidden_size + 1, 0
        self._xx = {first: torch.zeros(rows, rows, dtype=torch.float64) for first in self._lasts}
        self._xy = {
            first: torch.zeros(rows, _columns(model.spec, first, lasts), dtype=torch.float64)
            for first, lasts in self._lasts.items()
        }

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """One dense pass over the batch."""
        model = self._model
        ids, _, counted = model.tensors(batch)
        self.count += int(counted.sum())
        begun: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        end = max(lasts[-1] for lasts in self._lasts.values())
        for layer, before, after in model.dense_layers(ids):
            entered, left = before[counted], after[counted].double()
            keys_values = model.keys_values(layer, entered).double() if begun else left
            for first, (x, _) in begun.items():
                self._sum(first, self._key_value_slice(first, layer), x, keys_values)
            if layer in self._lasts:
                x = model.normed(entered.float()).double()
                x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
                self._xx[layer] += (x.T @ x).cpu()
                begun[layer] = (x, entered.double())
            for first, (x, hidden) in begun.items():
                if layer in self._lasts[first]:
                    self._sum(first, self._update_slice(first, layer), x, left - hidden)
            begun = {first: rows for first, rows in begun.items() if self._lasts[first][-1] > layer}
            if layer == end:
                return

    def fit(self, unit: Unit) -> Bypass:
        """The bypass of one of the units."""
        first, device = unit.first, self._model.device
        others = [self._key_value_slice(first, layer) for layer in unit.layers[1:]]
        chosen = [self._xy[first][:, columns] for columns in (self._update_slice(first, unit.last), *others)]
        xx = self._xx[first].to(device)
        xx = xx + RIDGE * self.count * torch.eye(len(xx), dtype=torch.float64, device=device)
        solved = torch.linalg.solve(xx, torch.cat(chosen, 1).to(device)).float().cpu().numpy()
        return Bypass({"weight": solved[:-1].copy(), "bias": solved[-1].copy()})

    def _sum(self, first: int, columns: slice, x: torch.Tensor, y: torch.Tensor) -> None:
        self._xy[first][:, columns] += (x.T @ y).cpu()

    def _update_slice(self, first: int, last: int) -> slice:
        """Columns of the update of the unit first..last: they lie before all K and V."""
        size = self._model.spec.hidden_size
        start = self._lasts[first].index(last) * size
        return slice(start, start + size)

    def _key_value_slice(self, first: int, layer: int) -> slice:
        size = 2 * key_value_size(self._model.spec)
        start = len(self._lasts[first]) * self._model.spec.hidden_size + (layer - first - 1) * size
        return slice(start, start + size)


def sums_bytes(spec: DecoderSpec, units: Iterable[Unit]) -> int:
    """Memory that the sums of these units take."""
    rows = spec.hidden_size + 1
    return sum(8 * rows * (rows + _columns(spec, first, lasts)) for first, lasts in _lasts(units).items())


def _lasts(units: Iterable[Unit]) -> dict[int, list[int]]:
    """The last layers of the units that begin at each layer."""
    found: dict[int, list[int]] = {}
    for unit in sorted(units):
        found.setdefault(unit.first, []).append(unit.last)
    return found


def _columns(spec: DecoderSpec, first: int, lasts: Sequence[int]) -> int:
    """An update to each last layer, and K and V of all layers but the first."""
    return len(lasts) * spec.hidden_size + (lasts[-1] - first) * 2 * key_value_size(spec)
