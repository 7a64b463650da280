"""What a trained policy does on held-out text: the figures on its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.gated_model import Decide, GatedModel, always, below
from dash_export.train.skip_modules import SkipModules
from dash_export.train.token_kl import divergence

BATCHES = 8
JUDGED_SEED = 20252
"""Of what is held out: not the training's."""
STATIC_SETS = 5
"""Of a static order, so many first sets are judged."""


@dataclass(frozen=True)
class Figures:
    """Means over the tokens past the prefix: layers skipped, KL from dense (nats), top-1 agreement, nll (nats)."""

    setting: str
    skipped: float
    kl: float
    top1: float
    nll: float


def held_out_batches(corpus: Corpus, windows: int, window: int, count: int = BATCHES) -> list[Batch]:
    """The same windows whatever the training's seed, so that trainings compare."""
    rng = np.random.default_rng(JUDGED_SEED)
    return [corpus.batch(rng, windows, window) for _ in range(count)]


@torch.no_grad()
def held_out_figures(
    model: GatedModel,
    modules: SkipModules,
    batches: Sequence[Batch],
    order: Sequence[int],
    trade_offs: tuple[float, float],
    progress: Progress = no_progress,
    points: int = 8,
) -> tuple[int, list[dict[str, object]]]:
    """(tokens judged, figures): dense, the token policy at `points` of its dial, and the first sets of the static
    `order` with the same bypasses.
    """
    units = modules.units
    sizes = torch.tensor([len(unit.layers) for unit in units], dtype=torch.float32, device=model.device)
    runs: list[tuple[str, Decide]] = [("dense", always(len(units), ()))]
    if modules.network:
        cost = modules.cost(model.spec)
        for value in np.geomspace(*trade_offs, points):
            runs.append((f"token, trade-off {value:.3g}", below(float(value) * cost)))
    for largest in range(1, min(STATIC_SETS, len(order)) + 1):
        chosen = order[:largest]
        runs.append((f"static, {', '.join(str(units[place]) for place in chosen)}", always(len(units), chosen)))
    sums, count = np.zeros((len(runs), 4)), 0
    for done, batch in enumerate(batches):
        ids, dense, counted = model.tensors(batch)
        # A token counts where the one after it is text too.
        counted = counted[:, :-1] & counted[:, 1:]
        following, final = ids[:, 1:][counted], model.dense(ids)[:, :-1][counted]
        count += len(following)
        for index, (_, decide) in enumerate(runs):
            rollout = model.rollout(ids, modules, decide, dense)
            found = divergence(model.head, final, rollout.final[:, :-1][counted], following)
            layers = rollout.skipped[:, :-1][counted].float() @ sizes
            values = (layers, found.kl, found.agree, -found.log_likelihood)
            sums[index] += [float(value.double().sum()) for value in values]
            progress("held-out text", done * len(runs) + index + 1, len(batches) * len(runs))
    rounded = (sums / count).round(4).tolist()
    return count, [asdict(Figures(name, *means)) for (name, _), means in zip(runs, rounded, strict=True)]
