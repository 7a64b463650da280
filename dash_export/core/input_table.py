"""The dial of an encoder's policy, from the answers that its exits gave to held-out pictures.

The policy brings a table (`HeldOut`), so a build needs neither pictures nor engines for its dial: by its own costs it
knows what each trade-off decides, and the table has what that does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from dash_export.core.dial import COSINE, CostTable, DialPoint
from dash_export.core.rule import decision_rule
from dash_export.core.units import Skips, Unit
from dash_export.errors import PolicyError
from dash_export.files.typed_json import WrongFieldError, typed

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Shares of (picture, unit) that the trade-offs skip. Two more skip nothing and everything."""


@dataclass(frozen=True)
class Picture:
    """A held-out picture. `damage` [units], as the policy predicts it, and whether it is `guarded`; by the unit where
    it leaves: `divergence` from the dense pooled vector (1 - cosine) and, where the model has a classifier, whether the
    likeliest class `changed`.
    """

    damage: tuple[float, ...]
    divergence: tuple[float, ...]
    guarded: bool = False
    changed: tuple[bool, ...] = ()


@dataclass(frozen=True)
class HeldOut:
    """The table: arrays over the pictures. `damage` [units, n], infinite where guarded; `divergence` [n, units + 1] and
    `changed`, bool or None, by the unit at which a picture leaves: at the last one it runs all.
    """

    damage: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64]
    changed: npt.NDArray[np.bool_] | None

    @property
    def differs(self) -> npt.NDArray[np.bool_]:
        """Whether the answer is another one than dense's [n, choices]."""
        return self.divergence > 1 - COSINE if self.changed is None else self.changed

    def of(self, skipped: Skips) -> npt.NDArray[np.intp]:
        """Return the unit at which each picture leaves [n] for skips [units, n]."""
        found: npt.NDArray[np.intp] = len(skipped) - skipped.sum(axis=0)
        return found


def held_out_text(pictures: Sequence[Picture]) -> str:
    """Write the table as JSON lines, for `SkipPolicy.answers`."""
    return "".join(json.dumps(asdict(one), separators=(",", ":")) + "\n" for one in pictures)


def held_out(text: str, units: int) -> HeldOut:
    """Read the table. Raises PolicyError for anything else."""
    try:
        lines = enumerate(text.splitlines())
        pictures = [typed(Picture, json.loads(line), f"picture {number}") for number, line in lines]
    except (WrongFieldError, ValueError, RecursionError) as error:
        raise PolicyError(f"The policy's held-out pictures cannot be read: {error} Train it again.") from error
    sizes = {(len(one.damage), len(one.divergence), len(one.changed)) for one in pictures}
    if len(sizes) != 1 or not sizes <= {(units, units, 0), (units, units, units)}:
        raise PolicyError("The policy's held-out pictures are not of its units: train it again.")
    damage = np.array([one.damage for one in pictures], np.float64).T
    damage[:, [one.guarded for one in pictures]] = np.inf
    changed, end = np.array([one.changed for one in pictures], np.bool_), np.zeros((len(pictures), 1), np.bool_)
    divergence = np.hstack([np.array([one.divergence for one in pictures]), end])
    return HeldOut(damage, divergence, np.hstack([changed, end]) if changed.size else None)


def input_dial(table: HeldOut, cost: CostTable, units: Sequence[Unit], num_layers: int) -> tuple[DialPoint, ...]:
    """Return the points of the dial, from dense to everything skipped, as means over the held-out pictures."""
    own = np.array(cost.cost)
    worth = np.flatnonzero(own > 0)
    points = [DialPoint(0.0, float(num_layers), cost.dense_asked, 0.0)]
    ratios = (table.damage[worth] / own[worth, None])[:, np.isfinite(table.damage).all(axis=0)]
    ratios = np.minimum.accumulate(ratios, axis=0)  # a unit is skipped where one before it is
    if not ratios.size:
        return tuple(points)
    sizes = np.array([len(unit.layers) for unit in units])
    found = {float(f"{trade_off:.6g}") for trade_off in (*np.quantile(ratios, SHARES), 1.01 * ratios.max() + 1e-9)}
    for trade_off in sorted(found - {0.0}):
        skipped = np.logical_or.accumulate(decision_rule(units, cost.cost, trade_off).skips(table.damage))
        at = np.arange(skipped.shape[1]), table.of(skipped)
        lost = table.divergence[at].mean()
        differing = int((table.differs[at]).sum())
        time = cost.token_time(skipped, asked=True).mean()
        layers = num_layers - float((sizes @ skipped).mean())
        figures = (round(layers, 4), round(float(time), 5), round(float(lost), 6))
        points.append(DialPoint(trade_off, *figures, differing=differing, judged=skipped.shape[1]))
    return tuple(points)
