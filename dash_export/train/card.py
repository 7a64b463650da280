"""The card of a policy: how it was trained, and what it does on held-out text."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export import __version__
from dash_export.decision import units_text
from dash_export.models import Checkpoint
from dash_export.policy import SkipPolicy
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.losses import dense_logits, divergence
from dash_export.train.model import Decide, SkipModules, always, below
from dash_export.train.own_answers import JUDGED_SEED
from dash_export.train.partition import Candidate
from dash_export.train.stages import Run

POINTS = 8
"""Number of trade-offs of the dial that are judged."""
STATIC_SETS = 5
"""Number of sets that are judged of a static order: its first unit, its first two, and so on."""


def policy_card(
    checkpoint: Checkpoint,
    policy: SkipPolicy,
    run: Run,
    held: Corpus,
    chosen: Sequence[Candidate],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the card of a policy that was trained in `run`, judged on `held`; `facts` are on it as they are given."""
    settings, place = run.settings, run.model.device
    rng = np.random.default_rng(JUDGED_SEED)
    batches = [held.batch(rng, settings.windows, settings.window, place) for _ in range(settings.judged_batches)]
    judged, figures = held_out_figures(run, SkipModules(policy).to(place), batches, policy.static_order)
    return {
        "model": Path(checkpoint.source).name,
        "model_fingerprint": checkpoint.fingerprint,
        **facts,
        "units": units_text(policy.units),
        "read": policy.read,
        "static_order": units_text(policy.units[place] for place in policy.static_order),
        "chosen": [asdict(candidate) | {"unit": str(candidate.unit)} for candidate in chosen],
        "settings": asdict(settings),
        "tokens": run.corpus.tokens(),
        "held_out": {"tokens": held.tokens(), "judged": judged, "figures": figures},
        "versions": {"dash-export": __version__} | {name: version(name) for name in ("torch", "transformers")},
        "precision": str(run.model.dtype).removeprefix("torch."),
        "device": f"{place.type}, {platform.machine()}, {torch.get_num_threads()} threads",
    }


@torch.no_grad()
def held_out_figures(
    run: Run, modules: SkipModules, batches: Sequence[Batch], order: Sequence[int]
) -> tuple[int, list[dict[str, object]]]:
    """Return (tokens judged, figures): a row for dense, for the token policy at POINTS trade-offs of its dial, and for
    the first sets of the static `order` with the same bypasses. Figures are means over the tokens past the prefix:
    layers skipped, KL from dense (nats), top-1 agreement with dense, nll (nats).
    """
    model, units = run.model, modules.units
    sizes = torch.tensor([len(unit.layers) for unit in units], dtype=torch.float32, device=model.device)
    runs: list[tuple[str, Decide]] = [("dense", always(len(units), ()))]
    if modules.network:
        cost = modules.cost(model.spec)
        for value in np.geomspace(*run.settings.trade_offs, POINTS):
            runs.append((f"token, trade-off {value:.3g}", below(float(value) * cost)))
    for largest in range(1, min(STATIC_SETS, len(order)) + 1):
        chosen = order[:largest]
        runs.append((f"static, {', '.join(str(units[place]) for place in chosen)}", always(len(units), chosen)))
    sums, count = np.zeros((len(runs), 4)), 0
    for done, (ids, dense, counted) in enumerate(batches):
        # A token counts where the one after it is text too.
        judged = counted[:, :-1] & counted[:, 1:]
        following, final = ids[:, 1:][judged], [*dense_logits(model.head, model.dense(ids)[:, :-1][judged])]
        count += len(following)
        for index, (_, decide) in enumerate(runs):
            rollout = model.rollout(ids, modules, decide, dense)
            found = divergence(model.head, final, rollout.final[:, :-1][judged], following)
            layers = rollout.skipped[:, :-1][judged].float() @ sizes
            values = (layers, found.kl, found.agree, -found.log_likelihood)
            sums[index] += [float(value.double().sum()) for value in values]
            run.progress("held-out text", done * len(runs) + index + 1, len(batches) * len(runs))
    rows = zip((name for name, _ in runs), *(sums / count).round(4).T.tolist(), strict=True)
    return count, [dict(zip(("setting", "skipped", "kl", "top1", "nll"), row, strict=True)) for row in rows]
